"""A Python that has imported everything already: programs of this interpreter are forked from this process in place of
being started, a tenth of a second each. Only for tests, and only where this process has one thread."""
import asyncio, faulthandler, gc, os, runpy, signal, subprocess, sys, threading, traceback
from contextlib import contextmanager
from multiprocessing import get_context

from tqdm import tqdm

# else the lock of its bars is one for all that are forked, and stays with who was killed while it had it
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
_fork_exec = getattr(subprocess, '_fork_exec', None)


def _run(args):
    "What `python args` does; its exit status."
    sys.argv, (first, *_) = args, args
    try:
        if first == '-m':
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name='__main__', alter_sys=True)
        else: runpy.run_path(first, run_name='__main__')
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _become(args, cwd, env, streams, own_session):
    "Turn the forked process into that program."
    if own_session: os.setsid()
    for fd, own in enumerate(streams):
        if own >= 0: os.dup2(own, fd)
    os.closerange(3, 4096)  # last the pipe whose end tells that the program has begun
    faulthandler.disable(), gc.freeze(), signal.set_wakeup_fd(-1), asyncio.set_event_loop_policy(None)
    signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cwd is not None: os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(o.split('=', 1) for o in map(os.fsdecode, env))
    if 'ipykernel_launcher' in args:  # it has read that when it was imported
        args = [*args, f"--IPKernelApp.parent_handle={os.environ.get('JPY_PARENT_PID', 0)}"]
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, encoding='utf-8', closefd=False)
                                         for fd, mode in enumerate('rww'))
    code = _run(args)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _fork(args, executables, close_fds, keep, cwd, env, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
          errpipe_read, errpipe_write, restore_signals, start_new_session, *others):
    args = [os.fsdecode(o) for o in args]
    if args[0] != sys.executable or args[1] == '-c':
        return _fork_exec(args, executables, close_fds, keep, cwd, env, p2cread, p2cwrite, c2pread, c2pwrite, errread,
                          errwrite, errpipe_read, errpipe_write, restore_signals, start_new_session, *others)
    if pid := os.fork(): return pid
    try: _become(args[1:], cwd, env, (p2cread, c2pwrite, errwrite), start_new_session)
    finally: os._exit(1)


@contextmanager
def warm():
    "In its context, and in what is forked there, programs and workers are forked."
    from lico import together
    subprocess._fork_exec, together.get_context = _fork, lambda kind: get_context('fork')
    try: yield
    finally: subprocess._fork_exec, together.get_context = _fork_exec, get_context
