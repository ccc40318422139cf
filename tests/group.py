"Processes that are forked from a test and work together, and an encoder that is small enough for them."
import functools, os, socket, traceback
from multiprocessing import get_context

import torch

from lico.text import load_text_encoder
from lico.together import join_group


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _member(rank, k, port, work, out):
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)  # of the process that was forked
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(k), LOCAL_WORLD_SIZE=str(k),
                       MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    try:
        join_group()
        torch.save(work(), f'{out}/{rank}.pt')
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_group(k, work, out):
    "What `work` gives in each of k processes."
    members = [get_context('fork').Process(target=_member, args=(i, k, port, work, out)) for port in [free_port()]
               for i in range(k)]
    for p in members: p.start()
    for p in members: p.join(200)
    assert [p.exitcode for p in members] == [0]*k
    return [torch.load(f'{out}/{i}.pt') for i in range(k)]


@functools.cache
def one_layer(dtype=torch.float32):
    "MiniLM with one of its six layers."
    enc = load_text_encoder('minilm')
    enc.model.encoder.layer = enc.model.encoder.layer[:1]
    return enc.to(dtype)
