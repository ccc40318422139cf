"The registry of arms against cells typed from the paper, the runs that a table takes, what is laid beside what."
import csv, math
from pathlib import Path
from types import SimpleNamespace

import nbformat, numpy as np, pandas as pd, pytest

import lico
from lico.evidence.pages import parameters
from lico.config import profile_settings, root
from lico.evidence.arms import (TABLES, arm_named, arm_of, arms_of, columns_of, compare, grade, grid, paper_dataset,
                                printed_as, printed_place)
from lico.evidence.printed import Printed, printed_number, printed_numbers, printed_table, results
from lico.evidence.stats import METRICS
from lico.experiments import Run, load_data, run_id
from test_stats import rows

PROFILES = 'smoke', 'laptop', 'paper'
TRAINED = 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13
FULL = dict(size='full', backbone='ResNet-50')
def p_of(n, profile='paper', **given): return parameters(f'table{n}', dict(profile=profile, out='', **given))
def stored(*args, **more): return rows(*args, **dict(paper_dataset='ImageNet-1k', is_stand_in=True) | more)


@pytest.mark.parametrize('table, label, dataset, place, metric, saliency, value', [
    (1, 'LICO', 'ImageNet-1k', FULL, 'overall', 'rise', 44.1),
    (1, 'CGC', 'ImageNet-1k', FULL, 'insertion', 'grad-cam', 52.2),
    (2, 'GCC', 'ImageNet-1k', dict(size='full', backbone='ResNet-18'), 'top5', None, 88.52),
    (3, 'CE', 'SVHN', dict(size='40', backbone='PARN-18'), 'accuracy_best', None, 14.7),
    (4, 'CGC', 'Aircraft', FULL, 'accuracy_last', None, 85.7),
    (5, 'CE+OT', 'ImageNet-1k', FULL, 'deletion', 'grad-cam', 16.0),
    (6, '0 tokens', 'ImageNet-1k', FULL, 'insertion', 'grad-cam', 54.1),
    (7, 'Cosine', 'VGG-Flowers', FULL, 'accuracy_last', None, 96.2),
    (8, 'CE', 'MS-COCO-2017-val', dict(size='full', backbone=''), 'pointing_game', 'xrai', 55.1),
    (9, 'CE', 'ImageNet-1k', dict(size='full', backbone='ViT-B/16'), 'deletion', 'grad-cam', 14.4),
    (10, 'DC off', 'CIFAR-100', dict(size='full', backbone='WRN'), 'accuracy_last', None, 81.3),
    (11, 'DC on', 'Stanford-Cars', dict(size='5-shot', backbone='ResNet-50'), 'accuracy_last', None, 37.2),
    (12, 'W2V-P', 'CIFAR-10', dict(size='4000', backbone='WRN'), 'accuracy_last', None, 80.2),
    (12, 'MiniLM', 'CIFAR-10', dict(size='full', backbone='WRN'), 'accuracy_last', None, 95.7),
    (13, 'Fixed', 'ImageNet-1k', FULL, 'deletion', 'grad-cam', 17.4)])
def test_cells_of_the_paper(table, label, dataset, place, metric, saliency, value):
    assert printed_numbers()[printed_as(table, arm_named(table, label), dataset, place, metric, saliency)] == value


@pytest.mark.parametrize('table, label, metric, saliency',
                         [(1, 'CGC', 'insertion', 'rise'), (5, 'CE+OT', 'deletion', 'random'),
                          (5, 'LICO', 'ses', 'grad-cam'), (3, 'CE+MM', 'accuracy_last', None),
                          (6, '4 tokens', 'insertion', 'rise'), (13, 'Random', 'top5', None)])
def test_what_is_not_printed(table, label, metric, saliency):
    for size, net in {(k.size, k.backbone) for k in printed_numbers() if k.table == table}:
        for dataset in ('ImageNet-1k', 'CIFAR-10'):
            assert printed_as(table, arm_named(table, label), dataset, dict(size=size, backbone=net), metric,
                              saliency) not in printed_numbers()


def test_every_number_has_one_place():
    "Read here with the csv module: the eight things tell the 271 rows apart, and lose none."
    with open(Path(lico.__file__).with_name('paper_results.csv'),
              encoding='utf-8') as f: lines = list(csv.DictReader(f))
    assert (len(lines) == len(printed_numbers()) == 271
            and sorted(float(r['value']) for r in lines) == sorted(printed_numbers().values()))
    for r in lines:
        assert printed_number(int(r['table']), r['dataset'], r['backbone'], r['method'], r['size'] or 'full', r['tag'],
                              r['variant'], r['metric']) == float(r['value'])
    assert results().groupby('table').size().to_dict() == {1: 34, 2: 16, 3: 38, 4: 48, 5: 16, 6: 24, 7: 10, 8: 12, 9: 6,
                                                           10: 8, 11: 32, 12: 12, 13: 15}
    t = results(3).set_index(['dataset', 'size', 'backbone', 'method'])
    assert (t.loc[('CIFAR-10', '250', 'WRN', 'LICO'), ['value', 'std']].tolist() == [41.7, 0.91]
            and '**41.7 ± 0.91**' in printed_table(3))
    for f in (results, printed_table):
        with pytest.raises(ValueError, match='no table 14'): f(14)


def test_each_printed_number_is_of_one_arm():
    for k in printed_numbers():
        metric, place = 'accuracy_last' if k.metric == 'top1' else k.metric, dict(size=k.size, backbone=k.backbone)
        of = [a.label for a in TABLES[k.table].arms if not a.stands_for
              and any(printed_as(k.table, a, k.dataset, place, metric, s) == k
                      for s in ('grad-cam', 'grad-cam++', 'rise', 'score-cam', 'group-cam', 'xrai'))]
        assert len(of) == 1, (k, of)


@pytest.mark.parametrize('n', TABLES)
def test_registry_is_consistent(n):
    t, labels = TABLES[n], [a.label for a in TABLES[n].arms]
    assert t.reference in labels and len(set(labels)) == len(labels) and set(columns_of(n)) <= set(METRICS)
    assert ({k.metric for k in printed_numbers() if k.table == n} == set(t.metrics)
            and arm_named(n, t.reference).stands_for == '')
    assert len({frozenset(a.options) for a in t.arms}) == 1, ('arms that set other options than their reference could '
                                                              'not be told apart')


def test_arm_of_a_run():
    for n, t in TABLES.items():
        for a in t.arms:
            for preset in ('paper', 'released', 'repaired'):
                assert arm_of(n, Run(method=a.method, options={**a.options, 'lr': 0.1}, preset=preset,
                                     text_encoder=a.text_encoder or 'clip')) is a
    with pytest.raises(ValueError, match="unknown arm of table 13: 'fixed': choose one of Learnable"):
        arms_of(13, SimpleNamespace(arms=['fixed']))


@pytest.mark.parametrize('n, label', [(6, '12 tokens'), (7, 'Euclidean'), (10, 'DC on'), (13, 'Learnable')])
def test_the_references_are_the_presets_own_choice(n, label):
    "Then a record of Table 3 is found by Tables 6, 7, 10 and 13."
    data = load_data(Run(labels=40))
    ids = [run_id(Run(labels=40, method='LICO', options=o), data) for o in ({}, arm_named(n, label).options)]
    assert ids[0] == ids[1] and TABLES[n].reference == label


def test_runs_of_a_table():
    "What is left open is what the table prints; what is asked for is done."
    for n in TRAINED:
        for profile in PROFILES:
            assert len({arm_of(n, r).label for r in grid(p_of(n, profile), n)} | {TABLES[n].reference}) > 1
    kinds = lambda n, **given: {(r.dataset, r.backbone, r.shots or r.labels) for r in grid(p_of(n, **given), n)}
    assert kinds(7) == {('cifar10', 'wrn_28_2', None), ('cifar100', 'wrn_28_8', None), ('svhn', 'wrn_28_2', None),
                        ('cub200', 'resnet50.tv_in1k', None), ('flowers102', 'resnet50.tv_in1k', None)}
    assert (kinds(9) == {('imagenet', 'vit_base_patch16_224', None)}
            and kinds(2) == {('imagenet', 'resnet18', None), ('imagenet', 'resnet50', None)})
    assert (kinds(13) == {('imagenet', 'resnet50', None), ('cifar10', 'wrn_28_2', None), ('cifar10', 'wrn_28_2', 4000)}
            and kinds(8) == {('imagenet', 'resnet50', None)})
    assert (kinds(7, backbones='parn_18', labels='123', datasets='svhn') == {('svhn', 'parn_18', 123)}
            and kinds(12, labels='40') == {('cifar10', 'wrn_28_2', 40)})
    assert kinds(3, backbones='resnet18', datasets='svhn') == {('svhn', 'resnet18', n) for n in (40, 1000, None)}


def test_what_a_dataset_says_of_its_runs():
    runs = grid(p_of(4), 4)
    assert {r.shots for r in runs} == {1, 5, 10, None} and {r.pretrained for r in runs} == {True}
    of = lambda r: (r.dataset, dict(r.options).get('init'), dict(r.options).get('n_context'))
    assert set(map(of, runs)) == {('cub200', None, None), ('cars', None, None), ('aircraft', 'a type of aircraft', 4),
                                  ('flowers102', None, None)}
    assert ({r.pretrained for r in grid(p_of(4, pretrained='no'), 4)} == {False}
            and {r.pretrained for r in grid(p_of(2, pretrained=True), 2)} == {True})
    assert {(r.epochs, dict(r.options)['batch_size']) for r in grid(p_of(2), 2)} == {(90, 128)}
    assert {(r.dataset, r.epochs) for r in grid(p_of(10), 10)} == {
        ('imagenet', 90), ('cifar10', None), ('cifar100', None), ('svhn', None)}, "None: the preset's 200"
    assert ({(r.epochs, r.steps) for r in grid(p_of(2, steps=7), 2)} == {(None, 7)}
            and {r.epochs for r in grid(p_of(2, epochs=3), 2)} == {3})
    assert {dict(r.options)['n_context'] for r in grid(p_of(6, options='n_context=3, tau=fixed'), 6)} == {
        0, 4, 8, 12, 16, 20}, 'the arm wins'


@pytest.mark.parametrize('n', sorted(TABLES))
def test_parameters_of_the_notebooks(n):
    "Papermill reads each declared name, of which there is one list; and a notebook is short."
    from papermill.inspection import inspect_notebook
    path = root()/'nbs'/f'table{n}.ipynb'
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    names = [line.split(' = ')[0].strip() for line in cells[0].source.splitlines()]
    assert (cells[0].metadata.tags == ['parameters'] and list(inspect_notebook(path)) == names
            and f'parameters("table{n}", globals())' in cells[1].source)
    assert set(profile_settings('laptop', f'table{n}')) | {'profile', 'out', 'arms', 'threads'} >= set(names)
    assert sum(bool(line.strip()) for c in cells[1:] for line in c.source.splitlines()) <= 40


def test_a_folder_is_not_taken_for_a_dataset_of_the_paper():
    assert paper_dataset('cars') == ('Stanford-Cars', False) and paper_dataset('folder:/home/me/cars') == (None, True)
    assert (paper_dataset('folder:/x/cars', stand_in='CIFAR-10') == ('CIFAR-10', True)
            and paper_dataset('folder:/x/mine', 4) == (None, True))
    assert [paper_dataset('digits', n)[0] for n in (3, 4, 5, 12)] == ['CIFAR-10', 'CUB-200', 'ImageNet-1k', 'CIFAR-10']
    assert printed_place(3, 'CIFAR-10', '123', 'wrn_28_2', True) == dict(
        size=None, backbone='WRN'), 'a table with several sizes is not guessed at'


def test_grades():
    row = lambda **o: SimpleNamespace(**dict(dataset='cifar10', is_stand_in=False, backbone='wrn_28_2') | o)
    assert (grade(row()) == "the paper's data" and grade(row(backbone='wrn_16_1')) == 'natural images'
            and grade(row(dataset='digits', is_stand_in=True)) == 'demonstration')
    assert grade(row(dataset='folder:mine', is_stand_in=True)) == 'natural images'


def test_maps_are_a_settings_own_and_accuracy_is_counted_once():
    def maps(arm, shift):
        return pd.concat(
            [stored(arm, [50., 60., 55.], saliency=s, images=9, insertion=[30. + shift + k, 31. + shift + k, 30.])
             for k, s in enumerate(('grad-cam', 'random'))])
    df = pd.concat([maps('Learnable', 0), maps('Random', 2)])
    c = compare(df, 13, ['accuracy_last', 'insertion'])
    assert (c.metric.tolist() == ['accuracy_last', 'insertion', 'insertion'] and c.n.tolist() == [3, 3, 3]
            and np.allclose(c.difference, [0, 4/3, 4/3]))
    assert (c.printed_value.tolist()[:2] == [75.88, 53.3] and math.isnan(c.printed_value[2])
            and pd.isna(c.printed_backbone[2]))
    assert compare(df.assign(images=[9]*6 + [8]*3 + [9]*3), 13,
                   'insertion').saliency.tolist() == ['random'], 'over other images'


def test_compare_refuses():
    df = pd.concat([stored('DC on', [1., 2.]), stored('DC off', [2., 3.])])
    with pytest.raises(ValueError, match='no seed at which both DC on and another method were run'):
        compare(df[df.arm == 'DC off'], 10)
    with pytest.raises(ValueError, match='the results have no top5'): compare(df, 10, ['accuracy_last', 'top5'])
    assert compare(df.assign(top5=[math.nan, 1.]*2), 10,
                   ['accuracy_last', 'top5']).n.tolist() == [2, 1], 'what was not measured is left out'
    assert Printed(3, 'CIFAR-10') == Printed(3, 'CIFAR-10', size='full')
