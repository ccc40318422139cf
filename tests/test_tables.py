"The registry of arms against cells typed from the paper, the runs that a table takes, and what is written of a comparison."
import csv, math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat, pandas as pd, pytest

import lico
from lico.config import parameters, profile_settings, root
from lico.experiments import Run, load_data, run_id
from lico.fidelity import fidelity_runs
from lico.tables import (METRICS, OF_MAPS, TABLES, arm_named, arm_of, arms_of, columns_of, grid, printed_cells, printed_key, printed_number, printed_place, printed_table)
from lico.writing import arm_label, markdown_table, sentences

PROFILES = 'smoke', 'laptop', 'paper'
MINE = 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13
def p_of(n, profile='paper', **given): return parameters(f'table{n}', dict(profile=profile, out='', **given), ('profile', 'out', *given))


@pytest.mark.parametrize('table, label, dataset, place, metric, saliency, value', [
    (1, 'LICO', 'ImageNet-1k', ('full', 'ResNet-50'), 'overall', 'rise', 44.1), (1, 'CGC', 'ImageNet-1k', ('full', 'ResNet-50'), 'insertion', 'grad-cam', 52.2),
    (2, 'GCC', 'ImageNet-1k', ('full', 'ResNet-18'), 'top5', None, 88.52), (3, 'CE', 'SVHN', ('40', 'PARN-18'), 'accuracy_best', None, 14.7),
    (4, 'CGC', 'Aircraft', ('full', 'ResNet-50'), 'accuracy_last', None, 85.7), (5, 'CE+OT', 'ImageNet-1k', ('full', 'ResNet-50'), 'deletion', 'grad-cam', 16.0),
    (5, 'LICO', 'ImageNet-1k', ('full', 'ResNet-50'), 'accuracy_last', None, 76.27), (6, '0 tokens', 'ImageNet-1k', ('full', 'ResNet-50'), 'insertion', 'grad-cam', 54.1),
    (7, 'Cosine', 'VGG-Flowers', ('full', 'ResNet-50'), 'accuracy_last', None, 96.2), (8, 'CE', 'MS-COCO-2017-val', ('full', ''), 'pointing_game', 'xrai', 55.1),
    (9, 'CE', 'ImageNet-1k', ('full', 'ViT-B/16'), 'deletion', 'grad-cam', 14.4), (10, 'DC off', 'CIFAR-100', ('full', 'WRN'), 'accuracy_last', None, 81.3),
    (11, 'DC on', 'Stanford-Cars', ('5-shot', 'ResNet-50'), 'accuracy_last', None, 37.2), (12, 'W2V-P', 'CIFAR-10', ('4000', 'WRN'), 'accuracy_last', None, 80.2),
    (12, 'MiniLM', 'CIFAR-10', ('full', 'WRN'), 'accuracy_last', None, 95.7), (13, 'Fixed', 'ImageNet-1k', ('full', 'ResNet-50'), 'deletion', 'grad-cam', 17.4)])
def test_cells_of_the_paper(table, label, dataset, place, metric, saliency, value):
    assert printed_cells()[printed_key(table, arm_named(table, label), dataset, place, metric, saliency)] == value


@pytest.mark.parametrize('table, label, metric, saliency', [(1, 'CGC', 'insertion', 'rise'), (5, 'CE+OT', 'deletion', 'random'), (5, 'LICO', 'ses', 'grad-cam'), (3, 'CE+MM', 'accuracy_last', None),
                                                           (6, '4 tokens', 'insertion', 'rise'), (13, 'Random', 'top5', None)])
def test_what_is_not_printed(table, label, metric, saliency):
    for place in {(k[2], k[4]) for k in printed_cells() if k[0] == table}:
        for dataset in ('ImageNet-1k', 'CIFAR-10'): assert printed_key(table, arm_named(table, label), dataset, place, metric, saliency) not in printed_cells()


def test_every_number_has_one_place():
    "Read here with the csv module: the eight things tell the 271 rows apart, and lose none."
    with open(Path(lico.__file__).with_name('paper_results.csv')) as f: rows = list(csv.DictReader(f))
    assert len(rows) == len(printed_cells()) == 271 and sorted(float(r['value']) for r in rows) == sorted(printed_cells().values())
    for r in rows:
        size = next((o for o in r['setting'].split(';') if o and '=' not in o), 'full')
        tag = next((o for o in r['setting'].split(';') if '=' in o), '')
        assert printed_number(int(r['table']), r['dataset'], r['backbone'], r['method'], size, tag, r['variant'], r['metric']) == float(r['value'])


def test_each_printed_number_is_of_one_arm():
    for key in printed_cells():
        of = [a.label for a in TABLES[key[0]].arms if not a.stands_for and any(
            printed_key(key[0], a, key[1], (key[2], key[4]), 'accuracy_last' if key[7] == 'top1' else key[7], s) == key for s in ('grad-cam', 'grad-cam++', 'rise', 'score-cam', 'group-cam', 'xrai'))]
        assert len(of) == 1, (key, of)


@pytest.mark.parametrize('n', TABLES)
def test_registry_is_consistent(n):
    t, labels = TABLES[n], [a.label for a in TABLES[n].arms]
    assert t.reference in labels and len(set(labels)) == len(labels) and set(columns_of(n)) <= set(METRICS)
    assert {k[7] for k in printed_cells() if k[0] == n} == set(t.metrics)
    assert len({frozenset(a.options) for a in t.arms}) == 1, 'arms that set other options than their reference could not be told apart'
    assert arm_named(n, t.reference).stands_for == ''


def test_arm_of_a_run():
    for n, t in TABLES.items():
        for a in t.arms:
            for preset in ('paper', 'released', 'repaired'):
                r = Run(method=a.method, options={**a.options, 'lr': 0.1}, preset=preset, text_encoder=a.text_encoder or 'clip')
                assert arm_of(n, r) is a
    with pytest.raises(ValueError, match='is of no arm of table 7, which has Euclidean, Cosine: make the runs with'): arm_of(7, Run(method='LICO'))
    with pytest.raises(ValueError, match="unknown arm of table 6: 'LICO': choose one of 0 tokens, 4 tokens"): arm_named(6, 'LICO')
    with pytest.raises(ValueError, match="unknown arm of table 13: 'fixed': choose one of Learnable"): arms_of(13, SimpleNamespace(arms='fixed'))


@pytest.mark.parametrize('n, label', [(6, '12 tokens'), (7, 'Euclidean'), (10, 'DC on'), (13, 'Learnable')])
def test_the_references_are_the_presets_own_choice(n, label):
    "Then a record of Table 3 is found by Tables 6, 7, 10 and 13."
    data = load_data(Run(labels=40))
    ids = [run_id(Run(labels=40, method='LICO', options=o), data) for o in ({}, arm_named(n, label).options)]
    assert ids[0] == ids[1] and TABLES[n].reference == label


def test_runs_of_a_table():
    "What is left open is what the table prints; what is asked for is done."
    for n in MINE:
        for profile in PROFILES:
            runs = grid(p_of(n, profile), n)
            assert {arm_of(n, r).label for r in runs} >= {TABLES[n].reference} and len({arm_of(n, r).label for r in runs}) > 1
    kinds = lambda n, **given: {(r.dataset, r.backbone, r.shots or r.labels) for r in grid(p_of(n, **given), n)}
    assert kinds(7) == {('cifar10', 'wrn_28_2', None), ('cifar100', 'wrn_28_8', None), ('svhn', 'wrn_28_2', None), ('cub200', 'resnet50.tv_in1k', None), ('flowers102', 'resnet50.tv_in1k', None)}
    assert kinds(9) == {('imagenet', 'vit_base_patch16_224', None)} and kinds(2) == {('imagenet', 'resnet18', None), ('imagenet', 'resnet50', None)}
    assert kinds(13) == {('imagenet', 'resnet50', None), ('cifar10', 'wrn_28_2', None), ('cifar10', 'wrn_28_2', 4000)}
    assert kinds(7, backbones='parn_18', labels='123', datasets='svhn') == {('svhn', 'parn_18', 123)} and kinds(12, labels='40') == {('cifar10', 'wrn_28_2', 40)}
    assert kinds(3, backbones='resnet18', datasets='svhn') == {('svhn', 'resnet18', n) for n in (40, 1000, None)}
    assert {(b, n) for _, b, n in kinds(3, datasets='cifar10')} == {('parn_18', 40), ('parn_18', 250), ('parn_18', 4000), ('wrn_28_2', 40), ('wrn_28_2', 250), ('wrn_28_2', 4000), ('wrn_28_2', None)}


def test_what_a_dataset_says_of_its_runs():
    runs = grid(p_of(4), 4)
    assert {r.shots for r in runs} == {1, 5, 10, None} and {r.pretrained for r in runs} == {True}
    assert {(r.dataset, dict(r.options).get('init'), dict(r.options).get('n_context')) for r in runs} == {('cub200', None, None), ('cars', None, None), ('aircraft', 'a type of aircraft', 4), ('flowers102', None, None)}
    assert {r.pretrained for r in grid(p_of(4, pretrained='no'), 4)} == {False} and {r.pretrained for r in grid(p_of(2, pretrained=True), 2)} == {True}
    assert {(r.epochs, dict(r.options)['batch_size']) for r in grid(p_of(2), 2)} == {(90, 128)}
    assert {(r.dataset, r.epochs) for r in grid(p_of(10), 10)} == {('imagenet', 90), ('cifar10', None), ('cifar100', None), ('svhn', None)}, "None: the preset's 200"
    assert {(r.epochs, r.steps) for r in grid(p_of(2, steps=7), 2)} == {(None, 7)} and {r.epochs for r in grid(p_of(2, epochs=3), 2)} == {3}
    assert {dict(r.options)['n_context'] for r in grid(p_of(6, options='n_context=3, tau=fixed'), 6)} == {0, 4, 8, 12, 16, 20}, 'the arm wins'


def test_context_phrases_take_as_many_tokens_as_they_say():
    import open_clip
    from lico.text import load_text_encoder
    encode, minilm = open_clip.get_tokenizer('ViT-B-32').encode, load_text_encoder('minilm')
    for options in (arm_named(13, 'Fixed').options, dict(grid(p_of(11), 11)[80*2].options)):
        assert options['init'] and len(encode(options['init'])) == len(minilm.name_ids(options['init'])) == options['n_context'] == 4


@pytest.mark.parametrize('n', MINE)
def test_parameters_of_the_notebooks(n):
    "Each declared parameter has a value in each profile, so that -p takes it; and a notebook is short."
    cells = [c for c in nbformat.read(root()/'nbs'/f'table{n}.ipynb', 4).cells if c.cell_type == 'code']
    assert cells[0].metadata.tags == ['parameters']
    names = [line.split(' = ')[0].strip() for line in cells[0].source.splitlines()]
    assert f'parameters("table{n}"' in cells[1].source and all(f'"{k}"' in cells[1].source for k in names)
    for profile in PROFILES: assert not set(names) - set(profile_settings(profile, f'table{n}')) - {'profile', 'out'}
    assert sum(bool(line.strip()) for c in cells for line in c.source.splitlines()) <= 40


ROW = dict(table=13, arm='Fixed', reference='Learnable', metric='accuracy_last', dataset='digits', labels='all', backbone='wrn_16_1', steps=120, method='LICO', preset='repaired', options=None,
           text_encoder='minilm', n=4, baseline=60., baseline_std=1.2, value=59., value_std=2., difference=-1., half_width=.5, verdict='contradicted', printed_for='ImageNet-1k', printed_backbone='ResNet-50',
           is_stand_in=True, printed_baseline=76.27, printed_value=76.2, degenerate=0, collapsed=0, constant=0, older_code=0)
def written(**more): return pd.DataFrame([ROW | more])


def test_what_is_written():
    text = markdown_table(written())
    for part in ('digits (for ImageNet-1k)', 'wrn_16_1 (for ResNet-50)', 'Fixed (repaired)', '60.0 ± 1.2', '59.0 ± 2.0', '-1.00 ± 0.50', 'a gain over Learnable?', '76.27 → 76.2', '0 of 4'): assert part in text
    assert 'metric' not in text and 'saliency' not in text
    assert sentences(written()) == ('* **digits (for ImageNet-1k), all labels, wrn_16_1 (for ResNet-50), 120 steps**: Fixed (repaired) with minilm changes accuracy by -1.00 ± 0.50 points over 4 pairs against '
                                    'Learnable, which shows a loss; the paper prints -0.07 on ImageNet-1k.')
    ce = dict(table=4, arm='CGC', reference='CE', method='CGC', text_encoder=None, labels='5-shot', is_stand_in=False, printed_backbone='WRN', preset='paper')
    assert ', 5-shot, wrn_16_1, 120 steps**: CGC (paper) changes accuracy by' in sentences(written(**ce)) and ' for ' not in markdown_table(written(**ce)) and 'nan' not in sentences(written(**ce))
    assert 'verdict' in markdown_table(written(**ce)) and 'a gain over' not in markdown_table(written(**ce))
    assert arm_label(SimpleNamespace(table=12, arm='MiniLM', preset='paper', options='alpha=5')) == 'MiniLM for BERT (paper, alpha=5)'


def test_arms_with_other_printed_gains_say_theirs():
    two = pd.concat([written(), written(arm='Random', printed_value=75.88, verdict='inconclusive')])
    assert 'which shows a loss; printed: -0.07; Random (repaired)' in sentences(two) and 'printed: -0.39' in sentences(two) and 'the paper prints' not in sentences(two)
    maps = pd.concat([two, written(metric='deletion', saliency='grad-cam', verdict='supported')])
    assert sentences(maps).count('* **') == 2 and 'changes deletion of grad-cam by -1.00 ± 0.50 points over 4 pairs against Learnable, which shows a gain, lower being better' in sentences(maps)
    dead = sentences(written(metric='deletion', saliency='grad-cam', images=10, constant=7, degenerate=4, collapsed=3))
    assert 'having ended degenerate in 4 of 4 runs and all images alike to 3 of the networks; 7 of 40 maps are constant' in dead
    assert markdown_table(maps).splitlines()[0].split('|')[1].strip() == 'metric' and '| — ' in markdown_table(maps)


def test_printed_tables():
    assert '| ResNet-50 LICO CE+OT    | 75.98 ' in printed_table(5) and '| Grad-CAM' not in printed_table(6) and printed_table(8).count('\n') == 13
    assert printed_table(12).splitlines()[0].split('|')[2:4] == [' CIFAR-10 full   ', ' CIFAR-10 4000   ']
    assert printed_place(3, 'CIFAR-10', '123', 'wrn_28_2', True) == (None, 'WRN'), 'a table with several sizes is not guessed at'


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'paper'])
def test_every_profile_has_runs_for_fidelity(profile):
    runs = fidelity_runs(parameters('fidelity', dict(profile=profile, out=''), ('profile', 'out')))
    assert {'CE', 'LICO'} == {r.method for r in runs} and 'repaired' in {r.preset for r in runs}
