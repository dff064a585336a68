"""Features inside of the page."""

import base64
import json

import torch
from torch.nn import functional as F

from trainer.report.explorer import quantise, to_json


def tokens(count=60, channels=96):
    """Of unit norm, along a few directions as tokens of an image are, with some noise."""
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(count, 12, generator=generator)
    directions = torch.randn(12, channels, generator=generator)
    noise = torch.randn(count, channels, generator=generator)
    return F.normalize(along @ directions + 0.3 * noise + 2, dim=-1)


def test_cosines_of_stored_tokens_are_nearly_those_of_the_tokens():
    unit_NC = tokens()

    stored = quantise(unit_NC, 32)

    for place in (0, 17, 59):
        error_N = stored.cosines(place) - unit_NC @ unit_NC[place]
        assert float(error_N.abs().max()) < 0.03
        assert stored.cosines(place)[place] == 1


def test_few_tokens_or_channels_are_kept_whole():
    unit_NC = tokens(count=3, channels=5)

    stored = quantise(unit_NC, 64)

    assert stored.values_ND.shape == (3, 3)
    torch.testing.assert_close(stored.cosines(1), unit_NC @ unit_NC[1], atol=0.02, rtol=0)


def test_what_the_script_reads_is_what_was_stored_and_cannot_end_its_element():
    stored = quantise(tokens(6, 8), 4)

    text = to_json((2, 3), {"</script>": stored}, (1, 1))

    assert "<" not in text
    content = json.loads(text)
    assert content["grid"] == [2, 3]
    view = content["views"]["</script>"]
    values = torch.frombuffer(bytearray(base64.b64decode(view["values"])), dtype=torch.int8)
    assert torch.equal(values.view(6, 4), stored.values_ND)
    torch.testing.assert_close(torch.tensor(view["scales"]), stored.scales_D, rtol=1e-4, atol=0)
