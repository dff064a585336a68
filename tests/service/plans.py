"""Models and plans for tests that need no HTTP."""

from service.batcher import EncodingPlan
from service.models import ServedModel
from service.warmup import WarmUp


def served_model(encoder=None, name="tiny", fingerprint="f"):
    """A model that is served as if it had been loaded."""
    return ServedModel(
        name=name,
        spec=name,
        encoders=(encoder,),
        graphs=(None,),
        warm_up=WarmUp(1000.0, 1e-3, 0.0, 1.0),
        buckets=((64, 64),),
        fingerprint=fingerprint,
    )


MODEL = served_model()


def plan(size=(32, 32), layers=(11,), model=MODEL, register_width=1, **wanted):
    return EncodingPlan(model, size, layers, register_width, **wanted)
