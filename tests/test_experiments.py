import json, shutil, time
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace

import pandas as pd, pytest, torch

from lico import config, experiments, records as records_module, runs
from lico.architectures import _at_commit
from lico.backbones import create_backbone
from lico.data import load
from lico.evidence.recipe import starting_network
from lico.experiments import (RIVALS, TRAINING_METHODS, Run, estimate, frame, load_data, run_id, runs_folder, spec,
                              start, sweep)
from lico.model import CrossEntropy
from lico.records import load_backbone, read_record, run, run_of, ship
from lico.shipping import load_network, preprocessing_of, save_network
from lico.text import load_text_encoder
from lico.training import fit

TINY = Run(labels=40, backbone='wrn_10_1', steps=1)


class Here:
    "An executor that does a job at once, in this process."
    def __init__(self): self.jobs = []

    def submit(self, todo, *args, **options):
        self.jobs.append(job := Future())
        try: job.set_result(todo(*args, **options))
        except Exception as e: job.set_exception(e)
        return job


def test_identity_is_what_the_method_reads(monkeypatch):
    monkeypatch.setattr(runs, 'encoder_name', lambda name: name)
    data = load_data(TINY)
    same = [replace(TINY, text_encoder='clip'), replace(TINY, options=dict(tau='fixed')), replace(TINY, split_seed=0),
            replace(TINY, image_size=16)]
    other = [replace(TINY, seed=1), replace(TINY, split_seed=1), replace(TINY, labels=50), replace(TINY, steps=2),
             replace(TINY, evaluations=2),
             replace(TINY, options=dict(lr=0.1)), replace(TINY, backbone='wrn_16_1'), replace(TINY, method='LICO'),
             replace(TINY, preset='released'),
             replace(TINY, threads=2)]
    key = lambda r: json.dumps(spec(r, load_data(r)), sort_keys=True)
    assert {key(r) for r in same} == {key(TINY)}
    assert len({key(r) for r in [TINY, *other]}) == len(other) + 1
    lico = replace(TINY, method='LICO')
    assert len({key(r) for r in (lico, replace(lico, text_encoder='clip'), replace(lico, options=dict(tau='fixed')),
                                 replace(lico, method='CE+MM'))}) == 4
    assert data.digest == spec(TINY, data)['data']


def test_a_rival_reads_its_own_options_only():
    data = load_data(TINY)
    key = lambda **o: json.dumps(spec(replace(TINY, **o), data), sort_keys=True)
    for method, own in (('CGC', dict(cgc_temperature=0.1)), ('GCC', dict(gcc_weight=1))):
        assert key(method=method) == key(method=method, text_encoder='clip', preset='repaired',
                                         options=dict(alpha=3, tau='fixed')) != key(method=method, options=own)
        for other in set(TRAINING_METHODS) - {method, 'LICO', 'CE+MM', 'CE+OT', 'LICO+CGC'}: assert key(method=other,
            options=own) == key(method=other) != key(method=method)
    assert len({key(method='LICO+CGC', options=o)
                for o in ({}, dict(alpha=3), dict(cgc_weight=2))}) == 3, 'both together read the options of both'
    assert all(set(arguments.values()) <= set(config.OPTIONS) for _, arguments in RIVALS.values())


@pytest.mark.parametrize('method, preset, expected', [
    ('CE', 'paper', '0a5fb31ff5fa'), ('LICO', 'paper', '483cabc929d1'), ('LICO', 'repaired', '46487a847795'),
    ('CE+MM', 'paper', 'e302ec066a43'), ('CE+MM', 'semantic', '7a7bbbff5a43'), ('CE+OT', 'paper', '587dcbc0e6bf'),
    ('CE+OT', 'repaired', '587dcbc0e6bf')])
def test_identities_of_finished_runs(method, preset, expected):
    "Committed results are found by these, which were computed before rivals and pretrained starts existed."
    r = Run(labels=40, backbone='wrn_16_1', method=method, preset=preset, seed=3, steps=120, evaluations=3)
    assert run_id(r).split('-')[0] == expected


def test_repr_is_the_command():
    r = Run(labels=40, method='LICO', seed=3, options=dict(tau='fixed', tau_init=0.3))
    assert eval(repr(r)) == r and hash(r)


@pytest.mark.parametrize('method', ['CGC', 'GCC'])
def test_a_rival_is_run_like_any_other(lico_root, monkeypatch, method):
    r = replace(TINY, method=method)
    first, ce, lico = sweep([r, TINY, replace(TINY, method='CE+OT')], progress=False)
    assert first[method.lower()] > 0 and first['spec']['losses'] == {k: config.preset()[k]
        for k in RIVALS[method][1].values()}
    assert not {'mm', 'ot', 'tau', 'entropy_image'} & set(first) and first['inactive'] is None
    assert first['id'].endswith('-p1') and first['protocol'] == 1
    net = load_backbone(first)
    assert set(net.state_dict()) == set(create_backbone('wrn_10_1', 10,
                                                        16).state_dict()), 'nothing but the classifier is left'
    both, old = frame([first, ce]), frame([ce, lico])
    assert both[method.lower()].notna().tolist() == [True, False] and both.text_encoder.isna().all()
    assert not {'pretrained', 'cgc', 'gcc'} & set(old), 'tables of other runs stay as they are'
    monkeypatch.setattr(records_module, '_train', lambda *a: pytest.fail('trained'))
    assert run(r, progress=False) == first


def test_methods_of_one_seed_start_alike():
    data = load_data(TINY)
    starts = [start(replace(TINY, method=m), data).backbone.state_dict() for m in ('CE', 'CGC', 'GCC')]
    assert all(torch.equal(a, b) for other in starts[1:] for a, b in zip(starts[0].values(), other.values()))
    model = start(replace(TINY, method='CGC', options=dict(cgc_weight=2, cgc_temperature=0.1)), data)
    assert (model.weight, model.temperature) == (2., 0.1)


def test_lico_and_cgc_together(lico_root):
    "It starts as LICO does, in the backbone, the prompts and the mapping, and logs the terms of both."
    data, encoder, r = load_data(TINY), load_text_encoder('minilm'), replace(TINY, method='LICO+CGC',
        preset='repaired', options=dict(cgc_weight=2))
    both, lico = (start(replace(r, method=m), data, encoder) for m in ('LICO+CGC', 'LICO'))
    assert (both.weight, both.options) == (2., lico.options) and both.state_dict().keys() == lico.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(both.state_dict().values(), lico.state_dict().values()))
    record = run(r, progress=False)
    assert record['cgc'] > 0 and record['mm'] > 0 and record['ot'] > 0
    assert record['spec']['losses']['cgc_weight'] == 2 and record[
        'spec']['losses']['alpha'] == 1
    assert set(load_backbone(record).state_dict()) == set(create_backbone('wrn_10_1', 10, 16).state_dict())


def test_finer_maps_are_in_the_record_and_in_what_is_shipped(lico_root):
    "As designed it stays out of the run's identity; otherwise the run, its network and the shipped one have it."
    r = replace(TINY, backbone='test_resnet', image_size=64, output_stride=16)
    data = load_data(r)
    assert 'output_stride' not in spec(replace(r, output_stride=None), data) and spec(r, data)['output_stride'] == 16
    record, x = run(r, progress=False), torch.rand(2, 3, 64, 64)
    net = load_backbone(record)
    assert run_of(record) == r and net.feature_shape[1] == 4*4
    ship(record, lico_root/'shipped')
    assert torch.equal(load_network(lico_root/'shipped').net(x), net(x)) and frame([record]).output_stride[0] == 16
    with pytest.raises(ValueError, match='output_stride = 12: expected 8 or 16'): replace(r, output_stride=12)


def pretend(monkeypatch, tmp_path, name, classes=1000):
    "Weights in Hugging Face's cache, as timm finds them where there is no network; the model they came from."
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file
    torch.manual_seed(42)
    net = timm.create_model(name, num_classes=classes)
    folder = tmp_path/f"models--timm--{runs.pretrained_weights(name)}"
    (folder/'snapshots'/'0').mkdir(parents=True)
    (folder/'refs').mkdir()
    (folder/'refs'/'main').write_text('0', encoding='utf-8')
    save_file(net.state_dict(), folder/'snapshots'/'0'/'model.safetensors')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return net


def test_pretrained_start(lico_root, monkeypatch, tmp_path):
    source = pretend(monkeypatch, tmp_path/'hub', 'test_resnet').state_dict()
    r = replace(TINY, backbone='test_resnet', image_size=64, pretrained=True)
    data, head = load_data(r), ('fc.weight', 'fc.bias')
    for method in ('CE', 'CGC'):
        net = start(replace(r, method=method), data).backbone.state_dict()
        assert all(torch.equal(net[k], source[k]) for k in net if k not in head) and net['fc.weight'].shape[0] == 10
    alike = [start(replace(r, method=m), data, runs.find_encoder('minilm')[0]).backbone.state_dict()
             for m in ('CE', 'CE+OT')]
    assert all(torch.equal(alike[0][k], alike[1][k]) for k in alike[0]), 'a pair starts from the same head'
    assert not any(start(o, data).backbone.fc.weight.any() for o in (r, replace(r, seed=1))), 'a new head is zero'
    first, plain = sweep([r, replace(r, pretrained=False)], progress=False)
    assert first['spec']['pretrained'] == 'test_resnet.r160_in1k' and 'pretrained' not in plain['spec']
    assert first['id'] != plain[
        'id']
    assert first['accuracy_last'] != plain['accuracy_last'] or first['ce'] != plain['ce']
    df = frame([first, plain])
    assert df.pretrained.tolist()[0] == 'test_resnet.r160_in1k'
    assert pd.isna(df.pretrained[1]) and df.training[0] != df.training[1], 'they are no pair'
    assert eval(repr(r)) == r and torch.equal(load_backbone(first).state_dict()['conv1.0.weight'],
                                              load_backbone(run(r)).state_dict()['conv1.0.weight'])


def test_what_has_no_pretrained_weights_is_said_before_training(lico_root, monkeypatch):
    monkeypatch.setattr(records_module, '_train', lambda *a: pytest.fail('trained'))
    with pytest.raises(ValueError, match='wrn_10_1 has no pretrained weights'): sweep([replace(TINY,
        pretrained=True)], progress=False)
    with pytest.raises(ValueError, match="value of pretrained: 'yes': choose one of True, False"): Run(pretrained='yes')


def test_sweep_does_equal_runs_once(lico_root, monkeypatch):
    "Two presets whose training options are equal share the baseline, also when other workers do the runs."
    done, train = [], records_module._train
    monkeypatch.setattr(records_module, '_train', lambda r, *a: (done.append(r), train(r, *a)))
    records = sweep([TINY, replace(TINY, options=dict(tau='fixed'))], progress=False, executor=Here())
    assert len(done) == 1 and len(records) == 2 and records[0]['id'] == records[1]['id']


@pytest.mark.parametrize('executor', [None, Here])
def test_sweep_goes_on_where_a_run_fails(lico_root, monkeypatch, executor):
    "The others are done; which failed and why is said at the end, and they are not tried again in the same sweep."
    done, train = [], records_module._train
    def fails(r, *a):
        done.append(r.seed)
        if r.seed in (0, 2): raise OSError(f'the disk {r.seed} is full')
        train(r, *a)
    monkeypatch.setattr(records_module, '_train', fails)
    runs = [replace(TINY, seed=s) for s in range(4)]
    said = r"2 of 4 runs failed, the others are done: Run\(.*\) \(OSError: the disk 0 is full\); Run\(.*seed=2.*disk 2"
    with pytest.raises(RuntimeError, match=said): sweep(runs, progress=False, executor=executor and executor())
    assert done == [0, 1, 2, 3] and len(list(runs_folder().glob('*/record.json'))) == 2


class Mortal(Here):
    "Its workers die the first times that they have a run of a seed."
    def __init__(self, deaths): super().__init__(); self.deaths = dict(deaths)

    def submit(self, todo, r, **options):
        if not self.deaths.get(r.seed): return super().submit(todo, r, **options)
        self.deaths[r.seed] -= 1
        def died(): raise BrokenExecutor('killed')
        return super().submit(died)


def test_a_run_whose_worker_died_is_begun_again(lico_root, capsys):
    runs = [replace(TINY, seed=s) for s in range(3)]
    assert len(sweep(runs[:2], progress=False, executor=Mortal({0: 2}))) == 2
    assert capsys.readouterr().err.count('begun again') == 2
    with pytest.raises(RuntimeError, match=r'1 of 1 runs failed.*seed=2.*BrokenExecutor: killed'):
        sweep(runs, progress=False, executor=Mortal({2: 3}))
    assert len(sweep(runs, progress=False, executor=Mortal({2: 3}), retries=3)) == 3


def test_one_bar_for_a_sweep(lico_root, capsys, monkeypatch):
    "It says how many are to do, running, done and failed, and an end once a like run is known."
    sweep([TINY], progress=False)
    shown = []
    monkeypatch.setattr(experiments._Progress, 'show', lambda p, running, show=experiments._Progress.show: (
        show(p, running), shown.append(p.bar.postfix)))
    sweep([replace(TINY, seed=s) for s in (1, 2)] + [replace(TINY, method='CE+LS')], executor=None)
    assert shown[0] == '2 to do, 1 running, 0 done, 0 failed, end unknown'
    assert shown[2].startswith('0 to do, 1 running, 2 done, 0 failed, end unknown')
    shown.clear()
    sweep([replace(TINY, seed=s) for s in (3, 4)])
    assert shown[1].startswith('0 to do, 1 running, 1 done, 0 failed, end ') and shown[1][-3] == ':'


def test_the_end_of_a_sweep_does_not_run_away(lico_root, monkeypatch):
    "Of two runs of ten hours of which one has been under way for four, side by side or one after the other."
    now, ends = [1e9], []
    monkeypatch.setattr(time, 'time', lambda: now[0])
    monkeypatch.setattr(time, 'strftime', lambda form, at: ends.append(time.mktime(at)) or 'end')
    p = experiments._Progress({k: dict(like='like', steps=10) for k in 'ab'}, 2, 2, False)
    p.speeds['like'] = 3600.
    for hours, running, expected in ((0, 'a', 20), (4, 'a', 20), (4, 'ab', 12), (6, 'ab', 12), (30, 'ab', 30)):
        now[0] = 1e9 + 3600*hours
        p.show(list(running))
        assert ends[-1] == 1e9 + 3600*expected


def test_estimate(lico_root):
    record = sweep([TINY], progress=False)[0]
    ahead = [replace(TINY, steps=n, seed=1) for n in (300, 600)]
    df = estimate([TINY, *ahead, replace(TINY, method='CE+OT', steps=10)])
    assert df.runs.tolist() == [2, 1] and df.images.tolist() == [900*40, 10*40] and df.like_runs.tolist() == [1, 0]
    assert df.hours[0] == pytest.approx(900*record['seconds']/3600) and pd.isna(df.hours[1])
    size = (runs_folder()/record['id']/'model.safetensors').stat().st_size
    assert df.gigabytes[0]*1e9 == pytest.approx(2*size, rel=0.1)
    assert estimate([replace(TINY, seed=1)], hardware='another').hours.isna().all()
    assert estimate([TINY]).hours.sum() == 0 and frame([]).accuracy_last.empty, 'nothing to do has columns too'


def test_sweep_says_what_is_missing_before_training(lico_root, monkeypatch):
    monkeypatch.setattr(records_module, '_train', lambda *a: pytest.fail('trained'))
    with pytest.raises(ValueError, match='unknown dataset'): sweep([TINY, replace(TINY, dataset='digit')],
        progress=False)
    with pytest.raises(ValueError, match='unknown text encoder'): sweep([TINY,
        replace(TINY, method='LICO', text_encoder='minlm')], progress=False)
    with pytest.raises(ValueError, match='unknown backbone'): sweep([TINY, replace(TINY, backbone='wrn_28')],
        progress=False)


def test_finished_runs_are_not_done_again(lico_root, monkeypatch):
    first = sweep([TINY, replace(TINY, seed=1)], progress=False)
    monkeypatch.setattr(records_module, '_train', lambda *a: pytest.fail('trained'))
    assert sweep([TINY, replace(TINY, seed=1)], progress=False) == first
    assert [r['run']['seed'] for r in first] == [0, 1]


@pytest.mark.parametrize('damage', [lambda t: t[:len(t)//2],
                                    lambda t: t.replace('"accuracy_last": ', '"accuracy_last": 1'), lambda t: '[]',
                                    lambda t: ''])
def test_damaged_record(lico_root, damage):
    first = run(TINY, progress=False)
    path = runs_folder()/first['id']/'record.json'
    path.write_text(damage(path.read_text(encoding='utf-8')), encoding='utf-8')
    with pytest.warns(RuntimeWarning, match='record.json is damaged'): assert read_record(path.parent) is None
    assert list(path.parent.glob('record.json.damaged-*')) and run(TINY,
        progress=False)['accuracy_last'] == first['accuracy_last']


@pytest.mark.parametrize('field, value', [('seed', '0-4'), ('seed', -1), ('seed', None), ('steps', 0), ('steps', -2),
                                          ('epochs', 0), ('evaluations', 0), ('labels', '40'), ('image_size', 1.5),
                                          ('threads', 0), ('threads', None)])
def test_run_refuses(field, value):
    with pytest.raises(ValueError, match=f'{field} = .*expected a whole number of at least'): Run(**{field: value})


def test_a_pretrained_network_sees_what_it_was_trained_on(lico_root, monkeypatch, tmp_path):
    "It is fed with its weights' own mean and std, which stand in its spec and record."
    import timm
    pretend(monkeypatch, tmp_path/'hub', 'test_resnet')
    r = replace(TINY, backbone='test_resnet', image_size=64, pretrained=True)
    cfg = timm.get_pretrained_cfg('test_resnet')
    data, plain = load_data(r), load_data(replace(r, pretrained=False))
    assert (data.mean, data.std) == (tuple(cfg.mean), tuple(cfg.std)) != (plain.mean, plain.std)
    assert spec(r, data)['normalisation'] == 'weights'
    assert 'normalisation' not in spec(replace(r, pretrained=False), plain)
    record = run(r, progress=False)
    assert record['preprocessing']['mean'] == list(cfg.mean) and record['preprocessing']['std'] == list(cfg.std)


@pytest.mark.parametrize('field, value', [('pretrained', 1), ('pretrained', 'yes'), ('pretrained', None)])
def test_pretrained_is_yes_or_no(field, value):
    with pytest.raises(ValueError, match='unknown value of pretrained: .*choose one of True, False'):
        Run(**{field: value})


def test_flip_came_later_and_counts_only_where_it_changes_something(tmp_path):
    "A run that says what the dataset says anyway is the same run."
    from PIL import Image
    for c in ('cat', 'dog'):
        (tmp_path/c).mkdir()
        for i in range(5): Image.new('RGB', (8, 8), (i, 0, c == 'cat')).save(tmp_path/c/f'{i}.png')
    mine = Run(dataset=f'folder:{tmp_path}', backbone='wrn_10_1', steps=1)
    for r, own in ((TINY, False), (mine, True)):
        same, other = replace(r, flip=own), replace(r, flip=not own)
        assert run_id(r) == run_id(same) != run_id(other) and load_data(other).flip is (not own)
        assert 'flip' not in spec(r, load_data(r)) and spec(other, load_data(other))['flip'] is (not own)
    assert Run(flip=False) == eval(repr(Run(flip=False))) and 'flip' not in repr(TINY)
    with pytest.raises(ValueError, match="unknown value of flip: 'no': choose one of True, False"):
        Run(flip='no')


def a_model(folder, **args):
    "A tiny model as timm writes it for others, with arguments and statistics that its architecture does not have."
    import timm
    torch.manual_seed(7)
    net = timm.create_model('test_vit', num_classes=10, img_size=64, **args)
    net.pretrained_cfg.update(mean=(.1, .2, .3), std=(.4, .5, .6))
    timm.models.save_for_hf(net, folder, model_args=dict(args, num_classes=10, img_size=64), safe_serialization=True)
    return net


def on_the_hub(tmp_path, monkeypatch, commit='c0ffee'.zfill(40), **args):
    "The same in Hugging Face's cache, where there is no network."
    from huggingface_hub import constants
    folder = tmp_path/'hub'/'models--me--tiny.mine'
    (folder/'refs').mkdir(parents=True, exist_ok=True)
    (folder/'refs'/'main').write_text(commit, encoding='utf-8')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    _at_commit.cache_clear()
    return a_model(folder/'snapshots'/commit, **args)


@pytest.mark.parametrize('place', ['hf-hub', 'local-dir'])
def test_models_from_elsewhere(lico_root, monkeypatch, tmp_path, place):
    "Weights, arguments, mean and std are those of the place; what was trained is built again without it."
    source = on_the_hub(tmp_path, monkeypatch, embed_dim=48, num_heads=3).state_dict()
    local = tmp_path/'hub'/'models--me--tiny.mine'/'snapshots'/'c0ffee'.zfill(40)
    name = 'hf-hub:me/tiny.mine' if place == 'hf-hub' else f'local-dir:{local}'
    r = replace(TINY, backbone=name, image_size=64, pretrained=True)
    data = load_data(r)
    assert (data.mean, data.std) == ((.1, .2, .3), (.4, .5, .6))
    net = start(r, data).backbone
    assert net.state_dict().keys() == source.keys() and net.embed_dim == 48
    assert all(torch.equal(v, source[k]) for k, v in net.state_dict().items())
    plain = start(replace(r, pretrained=False), data).backbone.state_dict()
    assert not torch.equal(plain['blocks.0.attn.qkv.weight'], source['blocks.0.attn.qkv.weight'])
    assert starting_network(name, data)[1].mean == (.1, .2, .3)
    record = run(r, progress=False)
    told = f"hf-hub:me/tiny.mine@{'c0ffee'.zfill(40)}" if place == 'hf-hub' else record['spec']['pretrained']
    assert record['spec']['backbone'] == record['spec']['pretrained'] == told and record['run']['backbone'] == name
    assert len(told.partition('@')[2]) in (40, 12) and frame([record]).backbone.tolist() == [name]
    trained = load_backbone(record).state_dict()
    if place == 'hf-hub': ship(record, tmp_path/'shipped')
    else: save_network(load_backbone(record), tmp_path/'shipped', data.class_names, preprocessing_of(data), name)
    if place == 'local-dir': (local/'model.safetensors').write_bytes((local/'model.safetensors').read_bytes()[:-1])
    else: on_the_hub(tmp_path, monkeypatch, 'deadbeef'.zfill(40), embed_dim=48, num_heads=3)
    assert run_id(r) != record['id'], 'other content is another run'
    shutil.rmtree(tmp_path/'hub')
    _at_commit.cache_clear()
    for again in (load_backbone(record), load_network(tmp_path/'shipped').net):
        assert all(torch.equal(v, trained[k]) for k, v in again.state_dict().items()) and again.embed_dim == 48
    with pytest.raises(FileNotFoundError if place == 'hf-hub' else ValueError,
                       match=f'{name}.*config.json') as e: run(r)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, sentence', [
    ('hf-hub:timm/resnet18.a1_in1k', "timm found no config.json of it in Hugging Face's cache .*fetch it where there"),
    ('hf-hub:a/b/c', 'no model hf-hub:a/b/c: .*Repo id must'),
    ('hf-hub:a@b@c', 'no model hf-hub:a@b@c: .*only contain'),
    ('local-dir:/nowhere', 'is no model of timm.*Config file not found: /nowhere/config.json.*save_for_hf'),
    ('timm/resnet18', "looks like a Hugging Face Hub repo id or a local path. Use 'hf-hub:timm/resnet18'"),
    ('zip:resnet18', "Unknown model source 'zip'"), ('hf-hub:', 'no model id')])
@pytest.mark.parametrize('pretrained', [True, False])
def test_models_from_elsewhere_that_are_not_there(lico_root, monkeypatch, tmp_path, name, sentence, pretrained):
    "One sentence, before anything is trained."
    on_the_hub(tmp_path, monkeypatch)
    monkeypatch.setattr(records_module, '_train', lambda *a: pytest.fail('trained'))
    for call in (lambda: create_backbone(name, pretrained=pretrained),
                 lambda: sweep([replace(TINY, backbone=name, pretrained=pretrained)], progress=False)):
        with pytest.raises((FileNotFoundError, ValueError), match=sentence) as e: call()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('content, sentence', [
    ('{"architecture": "resnet_of_mine"}', "timm has no architecture 'resnet_of_mine'"), ('{', 'JSONDecodeError'),
    ('{"architectures": ["ViTForImageClassification"]}', "KeyError: 'architecture'"),
    ('{"architecture": "test_vit", "pretrained_cfg": {"colour": 3}}', "colour")])
def test_folders_that_are_no_models_of_timm(tmp_path, content, sentence):
    (tmp_path/'config.json').write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match=f"is no model of timm's .*{sentence}.*: expected a config.json") as e:
        create_backbone(f'local-dir:{tmp_path}')
    assert '\n' not in str(e.value)


def test_own_networks_take_no_arguments_of_timm_s():
    with pytest.raises(ValueError, match='wrn_16_1 has no drop_rate'): create_backbone('wrn_16_1', drop_rate=.5)
    assert len(create_backbone('test_vit', 10, 32, depth=1).blocks) == 1


def test_a_record_tells_the_last_test_from_the_best():
    log = [dict(step=s, test_accuracy=a, ce=1., seconds=2.) for s, a in ((1, 30.), (2, 50.), (3, 40.))]
    o = records_module._outcome([*log[:2], dict(step=9, ce=1., seconds=2.), log[2]])
    assert (o['accuracy_last'], o['accuracy_best'], o['best_step'], o['tests']) == (40, 50, 2, 3) and o['seconds'] == 8


@pytest.mark.parametrize('control', ['names', 'shuffled', 'random'])
def test_a_seed_has_texts_of_its_own(control):
    "Derangement, invented words, first context and mapping: of the run's seed, not of the first one's."
    r, encoder = replace(TINY, method='LICO', options=dict(class_text=control)), load_text_encoder('minilm')
    a, b = (start(replace(r, seed=s), load_data(TINY), encoder) for s in (0, 1))
    said = [m.prompts.enc.word_embeddings(torch.cat(m.prompts.ids)) for m in (a, b)]
    assert torch.equal(*said) == (control == 'names') and not torch.equal(a.prompts.context, b.prompts.context)
    assert not torch.equal(a.mapping[0].weight, b.mapping[0].weight)


def test_what_a_step_draws_is_of_the_seed():
    "Shuffled contexts and dropout come from torch's generator, which each step seeds anew."
    class Heard(CrossEntropy):
        def forward(self, x, y): seen.append(torch.initial_seed()); return super().forward(x, y)
    seen, data = [], load('digits', labels=40)
    for s in (0, 1, 0): fit(Heard(create_backbone('wrn_10_1', 10, 16)), data, steps=2, seed=s, progress=False)
    assert len(set(seen)) == 4 and seen[:2] == seen[4:]
