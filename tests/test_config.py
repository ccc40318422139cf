import subprocess, sys
from dataclasses import asdict

import nbformat, pytest

from lico import config
from lico.losses import LossOptions
from lico.schedule import TrainOptions


def test_defaults_are_the_paper_preset():
    paper = config.preset('paper')
    assert {**asdict(LossOptions()), **asdict(TrainOptions())}.items() <= paper.items()


def test_paper_hyper_parameters_as_printed():
    "Section 4.2 and Table 6, typed from the paper."
    printed = dict(alpha=10, beta=1, n_context=12, epochs=200, batch_size=64, lr=0.03, momentum=0.9,
                   weight_decay=1e-4, hidden=512, schedule='cos7/16')
    assert printed.items() <= config.preset('paper').items()


def test_every_profile_fills_every_parameter_of_table3():
    declared = [c for c in nbformat.read(config.root()/'nbs'/'table3.ipynb', 4).cells
                if 'parameters' in c.metadata.get('tags', [])]
    assert len(declared) == 1
    names = tuple(config._assigned(declared[0].source))
    for profile in ('smoke', 'laptop', 'paper'):
        p = config.parameters('table3', {**dict.fromkeys(names, ''), 'profile': profile})
        assert p.profile == p.protocol == profile and p.seeds and (p.datasets or profile == 'paper') and p.presets


def test_a_changed_protocol_is_said():
    given = dict(profile='paper', out='', seeds='0', steps='1', image_size='', options='alpha=5, tau=fixed')
    p = config.parameters('table3', given)
    assert (p.profile, p.protocol) == ('paper', 'paper with options=alpha=5, tau=fixed, steps=1')


def test_options_of_training_on_the_command_line():
    given = dict(profile='smoke', out='', options='precision=bf16, supcon_weight=2, label_smoothing=0')
    assert config.parameters('table3', given).options == dict(precision='bf16', supcon_weight=2.,
        label_smoothing=0.)
    with pytest.raises(ValueError, match="option precision: 'half': choose one of fp32, bf16"): config._as_options(
        'precision=half')


def test_stored_is_checked_before_anything_runs():
    given = dict(profile='smoke', out='', stored='olny')
    with pytest.raises(ValueError, match="unknown value of stored: 'olny': choose one of add, only"): config.parameters(
        'table1', given)


def test_root_is_found_in_order(tmp_path, monkeypatch):
    checkout = config.root()
    monkeypatch.chdir(tmp_path)
    assert config.root() == checkout, 'the installed checkout'
    other = tmp_path/'other'
    (other/'deep').mkdir(parents=True)
    (other/'settings.ini').write_text((checkout/'settings.ini').read_text())
    monkeypatch.chdir(other/'deep')
    assert config.root() == other, 'the working folder upwards'
    monkeypatch.setenv('LICO_ROOT', str(tmp_path))
    assert config.root() == tmp_path, 'LICO_ROOT'
    monkeypatch.setenv('LICO_ROOT', str(tmp_path/'nowhere'))
    with pytest.raises(FileNotFoundError, match='LICO_ROOT is .* not a folder'): config.root()


def test_someone_elses_settings_ini_is_not_ours(tmp_path, monkeypatch):
    checkout = config.root()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = other\n')
    monkeypatch.chdir(tmp_path)
    assert config.root() == checkout


@pytest.mark.parametrize('module', ['lico.model', 'lico.training', 'lico.experiments', 'lico.paper'])
def test_import_is_light(module):
    heavy = "('open_clip', 'transformers', 'captum', 'matplotlib', 'timm', 'sklearn', 'accelerate')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          check=True).stdout.strip() == '[]'


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import errno, os
    path = tmp_path/'a.txt'
    config.write_atomic(path, 'old')
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*make room there and start again'):
        config.write_atomic(path,
        'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
