"""Limits on the files of pictures. The server and its sandbox share them, and only the sandbox loads a decoder."""

from exo.worker.runner_common.sandbox import SandboxLimits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""By Pillow's names."""
MOST_PIXELS = 64_000_000
"""The most pixels of a file. Cameras of phones have up to 50 million."""
MOST_RATIO = 100
"""The largest ratio of a picture's sides."""
MOST_PICTURES = 100
"""The most pictures of one request."""
LIMITS = SandboxLimits(seconds=60, address_space=2 << 30, answer_bytes=20 << 20, cpu_seconds=20)
