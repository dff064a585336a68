"""Pictures of the doctor's page."""

import torch

from trainer.doctor.measure import Masks, Shown
from trainer.doctor.pictures import rows

GRID = (2, 2)


def test_the_attention_filter_s_share_is_of_what_the_others_keep():
    # The others keep two of four tokens, and attention one of those.
    others = torch.tensor([[True, True, False, False]])
    masks = Masks(
        fixed_pattern=others,
        global_proxy=others,
        register_guided=others,
        attention_hijack=torch.tensor([[True, False, True, True]]),
        clean=torch.tensor([[True, False, False, False]]),
    )
    pixels = torch.zeros(3, 32, 32)
    one = Shown(pixels, torch.tensor([0.0, 0.0, 0.5, 0.5]), pixels, torch.rand(4, 8), 0)

    (captions,) = [
        [caption for caption, _ in row] for row in rows([one], masks, GRID, off={"fixed_pattern"})
    ]

    assert captions[2:] == [
        "fixed pattern: 50% kept (off)",
        "global proxy: 50% kept",
        "register-guided: 50% kept",
        "attention hijack: 50% of what the others keep",
        "all enabled: 25% kept",
    ]
