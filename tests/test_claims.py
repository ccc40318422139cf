"The paper's claims: evidence from stored results, verdicts turned round where a claim is a loss, what is kept in figures/paper not stale."
import io, math

import numpy as np, pandas as pd, pytest

from lico.claims import CLAIMS, draw_evidence, evidence, evidence_sentence, evidence_table, maps_sentences
from lico.config import root
from lico.paper import verdict

COLUMNS = dict(dataset='digits', data='d', labels='all', backbone='wrn_16_1', image_size=16, validation=None, steps=120, training='t', preset='paper', options=None, text_encoder='minilm',
               paper_dataset='CIFAR-10', is_stand_in=True, degenerate=None, older_code=False)


def store(folder, method, values, **more):
    path = root()/'figures'/folder/'results.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(values)
    df = pd.DataFrame(COLUMNS | dict(method=method, seed=range(n), split=range(n), accuracy_last=values, id=[f'{folder}{method}{more}{i}' for i in range(n)]) | more)
    df = pd.concat([pd.read_csv(path), df]) if path.exists() else df
    df.to_csv(path, index=False)


def test_a_loss_that_is_claimed_is_supported_by_a_loss(lico_root):
    "Tables 5 and 10: the arm must lose for the claim to hold."
    base = np.array([60., 61., 62., 63.])
    for shift, says in ((-3., 'supported'), (3., 'contradicted')):
        for f in (lico_root/'figures').glob('*/results.csv'): f.unlink()
        noise = np.array([.1, -.1, .05, 0])
        store('table5', 'CE', base, text_encoder=None, arm='CE', paper_dataset='ImageNet-1k'); store('table5', 'CE+OT', base + shift + noise, arm='CE+OT', paper_dataset='ImageNet-1k')
        store('table10-x', 'LICO', base, arm='DC on'); store('table10-x', 'LICO', base + shift + noise, arm='DC off')
        e = evidence().set_index(['table', 'arm'])
        ot, off = e.loc[(5, 'CE+OT')], e.loc[(10, 'DC off')]
        assert ot.says == off.says == says and ot.verdict == verdict(shift + noise, -.15) and off.folder == 'table10-x' and ot.difference == pytest.approx(shift + noise.mean())
        assert e.says[3, 'LICO'] == 'not measured' and len(e) == len(CLAIMS)


def test_the_larger_of_two_sets_of_pairs_is_taken(lico_root):
    for folder, n in (('table3', 3), ('table3-more', 5), ('table3-other', 4)):
        more = dict(labels='40') if folder == 'table3-other' else {}
        store(folder, 'CE', np.arange(n)*1., text_encoder=None, **more)
        for preset, shift in (('paper', 0), ('repaired', 1)): store(folder, 'LICO', np.arange(n) + np.linspace(1, 2, n) + shift, preset=preset, **more)
    e = evidence()
    e = e[e.table == 3]
    assert e.n.tolist() == [5, 5, 4, 4] and e.folder.tolist() == ['table3-more']*2 + ['table3-other']*2 and e.preset.tolist() == ['paper', 'repaired']*2
    table, said = evidence_table(e), evidence_sentence(evidence())
    assert table.count('\n') == 2 and '| all labels: supported: +1.50 ± 0.49 from 2.0 (0 of 5 degenerate)<br>40 labels: supported: +1.50 ± ' in table and '| all labels: supported: +2.50 ± 0.49 from 2.0 (0 of 5 degenerate)<br>40 labels: supported: +2.50 ± ' in table and '| digits (for CIFAR-10) | wrn_16_1  | all labels: +0.20<br>40 labels: +1.50 |' in table and 'WRN' not in table.splitlines()[2]
    assert said.startswith(f"1 of {len(CLAIMS)} claims have been measured here, all on stand-ins for the paper's data. Each setting and reading gives a verdict. LICO's accuracy: 4 supported. Not measured: ") and 'CGC costs accuracy (Table 2)' in said
    assert evidence_table(pd.read_csv(io.StringIO(e.to_csv(index=False)), dtype=dict(labels=str, options=str))) == table, 'the same from the file'
    fig = draw_evidence(e)
    assert [o.get_color() for o in fig.axes[0].lines[:1]] == ['tab:green'] and len(fig.axes[0].get_yticks()) == 4


def test_readings_of_matching_are_one_where_there_is_none(lico_root):
    store('table5', 'CE', [50., 60., 71.], text_encoder=None)
    for preset in ('paper', 'repaired'): store('table5', 'CE+OT', [51., 60., 70.], preset=preset)
    e = evidence()
    assert len(e) == len(CLAIMS) and 'inconclusive: +0.00 ± 2.48 from 60.3 (n = 3)' in evidence_table(e) and "ablations and rivals: 1 inconclusive" in evidence_sentence(e)


def test_maps_are_asked_for_by_their_method(lico_root):
    for method, shift in (('CE', 0), ('LICO', 2)):
        for s, k in (('grad-cam', 1), ('random', 5)):
            store('table1', method, [50., 60.], saliency=s, saliency_options=None, images=9, insertion=[30. + shift*k, 31. + 1.01*shift*k], probability=[90., 80. - 10*shift], text_encoder=None if method == 'CE' else 'minilm', paper_dataset='ImageNet-1k')
    store('table8', 'pretrained', [math.nan], saliency='grad-cam', saliency_options=None, images=9, pointing_game=[50.])
    e = evidence().set_index('claim')
    assert e.difference["LICO's Grad-CAM maps are better at insertion"] == pytest.approx(2.01) and e.says["LICO's Grad-CAM maps are better at insertion and deletion together"] == 'not measured'
    assert 'supported: +2.01 ± 0.13 from 30.5; confidence -10.00 (0 of 2 degenerate)' in evidence_table(e.reset_index())
    assert '; confidence -10.00, when blurred -4.00 (0 of 2' in evidence_table(e.reset_index().assign(blurred=-4.))
    assert e.says[e.table == 8].tolist() == ['not measured'], 'a network without a pair is evidence of nothing'


def test_no_method_of_maps_is_passed_over(lico_root):
    for method, shift in (('CE', 0), ('LICO', 2)):
        for s, k in (('grad-cam', 1), ('rise', -3), ('random', 50)):
            store('table8-x', method, [50., 60. - shift], saliency=s, saliency_options=None, images=9, pointing_game=[30. + shift*k, 31. + 1.01*shift*k], text_encoder=None if method == 'CE' else 'minilm', paper_dataset='MS-COCO-2017-val')
    store('table1', 'pretrained', [math.nan], saliency='grad-cam', saliency_options=None, images=9, insertion=[50.])
    assert maps_sentences().splitlines() == [
        '* **digits (for MS-COCO-2017-val), all labels, 120 steps, pointing game**: 2 comparisons (2 methods, 1 readings, 2 pairs each), 1 contradicted, 1 supported; from -6.03 ± 0.38 (rise, paper) to +2.01 ± 0.13 (grad-cam, paper) points.',
        '* The accuracy of these networks changed by -1.00 ± 0.89 (LICO (paper)).']
    store('table1-y', 'CE', [50.], saliency='grad-cam', saliency_options=None, images=9, insertion=[50.])
    store('table1-y', 'CGC', [50.], saliency='grad-cam', saliency_options=None, images=9, insertion=[51.])
    assert len(maps_sentences().splitlines()) == 2, 'pairs without LICO say nothing of LICO'


def test_what_is_kept_is_what_the_results_say():
    "Run nbs/paper.ipynb again when results below figures/ change."
    e = pd.read_csv(io.StringIO(evidence().to_csv(index=False)), dtype=dict(labels=str, options=str))
    kept = pd.read_csv(root()/'figures'/'paper'/'results.csv', dtype=dict(labels=str, options=str))
    assert evidence_table(e) == evidence_table(kept) and evidence_sentence(e) == evidence_sentence(kept)
