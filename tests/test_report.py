"What is written and drawn of a comparison."
import math

import pandas as pd, pytest

from lico.evidence.arms import compare
from lico.evidence.report import (arm_label, comparison_table, forest, results_title, save_table, sentences, signed,
                                  stamp_table)
from lico.evidence.stats import paired
from test_arms import stored


def comparison(**more):
    "Table 13's Random and Fixed beside Learnable, on digits."
    shift = dict(Learnable=0, Fixed=-1, Random=2)
    more = dict(labels='all', entropy_image=.5, entropy_text=.5, cosine=.4) | more
    return pd.concat([stored(arm, [60. + d, 61. + 1.1*d, 62. + d], **more) for arm, d in shift.items()])


def test_a_row_in_three_forms():
    c = compare(comparison(), 13)
    table, said = comparison_table(c), sentences(c)
    fixed = c[c.arm == 'Fixed'].iloc[0]
    for part in ('digits (for ImageNet-1k)', 'wrn_16_1 (for ResNet-50)', 'Fixed (paper)', '61.0 ± 1.0',
                 f'{fixed.difference:+.2f} ± {fixed.half_width:.2f}', '76.27 → 76.2', '0 of 3'): assert part in table
    assert 'metric' not in table and 'saliency' not in table and 'failed' not in table
    changes = f'{fixed.difference:+.2f} ± {fixed.half_width:.2f}'
    assert f'Fixed (paper) with minilm: accuracy {changes} points over 3 pairs against Learnable' in said
    assert said.startswith('* **digits (for ImageNet-1k), all labels, wrn_16_1 (for ResNet-50), 120 steps**: ')
    assert said.count('\n') == 0
    ax = forest(c).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['Fixed (paper)',
                                                            'Random (paper)'] and 'Learnable' in ax.get_xlabel()


def test_sign_flips_stand_beside_eight_pairs():
    "Nothing below; of eight differences of one sign 2 of 256 signs go as far."
    rows = lambda n, shift: stored('Fixed' if shift else 'Learnable', [60. + i*.01 + shift*(1 + i) for i in range(n)],
                                   labels='all', entropy_image=.5, entropy_text=.5, cosine=.4)
    few, many = (comparison_table(compare(pd.concat([rows(n, 0), rows(n, 1)]), 13)) for n in (7, 8))
    assert 'sign flips' not in few and '| p by sign flips ' in many and '| 0.0078 ' in many


def test_what_goes_wrong_is_said():
    dead = sentences(compare(comparison(metric='deletion', saliency='grad-cam', images=10, constant=7,
                                        accuracy_last=10.2).assign(entropy_text=.9999), 13, 'deletion'))
    assert 'matching was inactive in 3 of 3 runs; training failed in 3 of 3; 21 of 30 maps are constant' in dead
    assert 'deletion of grad-cam' in dead


def test_settings_get_a_line_each():
    c = compare(pd.concat([comparison(labels='all'), comparison(labels='40').assign(id=lambda d: d.id + ' 40')]), 13)
    assert sentences(c).count('* **') == 2 and '40 labels' in sentences(c) and len(forest(c).axes[0].get_yticks()) == 4


def test_confidence_is_told_beside_scores_and_is_none():
    c = compare(comparison(), 13)
    both = pd.concat([c, c.assign(metric='probability')], ignore_index=True)
    assert '| confidence ' in comparison_table(both) and 'confidence' not in sentences(both)
    assert [ax.get_title() for ax in forest(both).axes] == ['accuracy']
    assert 'confidence' in sentences(both[both.metric == 'probability']), 'where nothing else is asked for'


def test_methods_of_saliency_are_compared_in_the_same_words():
    maps = pd.DataFrame([dict(id='n', dataset='photographs', saliency=s, image=str(i), insertion=10.*i + shift*(i + 1))
                         for s, shift in (('random', 0), ('rise', 1)) for i in range(4)])
    c = paired(maps, ['insertion'], 'random', setting=['id', 'dataset'], treatment=['saliency'], unit=['image'])
    assert arm_label(c.iloc[0]) == 'rise'
    wanted = '* **photographs**: rise: insertion +2.50 ± 2.05 points over 4 pairs against random.'
    assert sentences(c) == wanted
    assert comparison_table(c).splitlines()[0].split('|')[1:3] == [' dataset     ',
        ' method   '] and len(forest(c).axes) == 1


@pytest.mark.parametrize('printed', [True, False])
def test_every_forest_says_what_a_filled_mark_is(printed):
    "With a printed difference and without; and its dots can be seen."
    c = compare(comparison(), 13).assign(half_width=[.5, 9.])
    fig = forest(c if printed else c.drop(columns=['printed_value', 'printed_baseline']))
    said = [o.get_text() for legend in fig.legends for o in legend.get_texts()]
    assert said == ['filled: the 95 % interval leaves 0 out', *['printed']*printed]
    filled = [o.lines[0].get_markerfacecolor() != 'white' for o in fig.axes[0].containers]
    assert filled == (abs(c.difference) > c.half_width).tolist() and len(set(filled)) == 2
    dots = [line for line in fig.axes[0].lines if line.get_marker() == '.']
    assert len(dots) == 2 and all(line.get_markersize() >= 6 and line.get_alpha() >= .5 for line in dots)


@pytest.mark.parametrize('mean, half, text', [(1.234, .5, '+1.23 ± 0.50'), (-.001, math.inf, '+0.00'),
                                              (-1.5, math.nan, '-1.50')])
def test_signed(mean, half, text): assert signed(mean, half) == text


def test_titles_and_stamps(tmp_path):
    df = comparison(profile='laptop', protocol=1, hardware='a laptop', seconds=20., text_encoder='minilm')
    assert results_title('Table 13', df) == 'Table 13 on digits, text by minilm, profile laptop, a demonstration'
    assert results_title('Table 13', df.assign(dataset='cifar10')).endswith('profile laptop')
    assert '| protocol' in stamp_table(df) and '| training time | 3.0 min' in stamp_table(df)
    save_table('# x', forest(compare(df, 13)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['figure.png', 'table.md']
