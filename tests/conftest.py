import gc, os

import pytest

os.environ.setdefault('LICO_DEVICE', 'cpu')  # bit-for-bit claims are made for the CPU
# pytest-xdist runs a process a core; torch reads it when it is imported, here and in the processes that tests start
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # two threads on a busy core: the one that waits gives way


@pytest.fixture
def lico_root(tmp_path, monkeypatch):
    "A root of its own, so that no test touches the project's records or figures."
    monkeypatch.setenv('LICO_ROOT', str(tmp_path))
    return tmp_path


@pytest.fixture(scope='module')
def module_root(tmp_path_factory):
    "The same for all tests of a module that look at one run."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LICO_ROOT', str(tmp_path_factory.mktemp('root')))
        yield


def pytest_collection_finish():
    "statsmodels collects garbage at each call, half a second among all that is imported by now."
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope='session')
def small_segments():
    "XRAI cuts pictures of 224 pixels, which takes seconds."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('saliency.core.xrai._FELZENSZWALB_IM_RESIZE', (48, 48))
        yield
