import os

import pytest

os.environ.setdefault('LICO_DEVICE', 'cpu')  # bit-for-bit claims are made for the CPU


@pytest.fixture
def lico_root(tmp_path, monkeypatch):
    "A root of its own, so that no test touches the project's records or figures."
    monkeypatch.setenv('LICO_ROOT', str(tmp_path))
    return tmp_path
