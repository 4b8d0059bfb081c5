"""One server for all tests of a file, on a model that says several words."""

import io

import numpy as np
import pytest
from PIL import Image

from moresjax.testing import talking_model


@pytest.fixture(scope="session")
def model():
    """What the server is asked, for comparison: another object with the same weights."""
    return talking_model()


@pytest.fixture(scope="session")
def server():
    from moresjax.serve.server import Server, ServerConfig

    config = ServerConfig(rows=4, max_waiting=32, max_new_tokens=256, default_new_tokens=8)
    return Server(talking_model(), "talker", config)


@pytest.fixture(scope="session")
def url(server):
    from moresjax.serve.run import running

    with running(server) as address:
        yield address


@pytest.fixture(scope="session")
def picture() -> bytes:
    """The bytes of a PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
