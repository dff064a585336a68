"""HTTP service: photographs in, clean dense features out.

    python -m service --model models/demo

One request, file by file: `app` (routes) -> `bodies` (what was sent) -> `decoding` (pixels, in
threads) -> `batcher` and `engine` (tokens, one thread per device) -> `wire` (what is sent back).
"""
