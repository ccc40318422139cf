"Results in two files: kept or replaced together, and each image's scores found with its run."
import numpy as np, pandas as pd, pytest

from lico.evidence.store import image_rows, read_results, write_results


def results(*ids, options=None, scheme=None):
    rows = pd.DataFrame(dict(id=ids, saliency='rise', saliency_options=options, scheme=scheme, seed=range(len(ids)),
                             arm='CE', insertion=2.))
    images = rows[['id', 'saliency', 'saliency_options', 'scheme']].merge(pd.DataFrame(dict(image=['1', '2', '3'])),
        how='cross')
    return rows, images.assign(insertion=[1., 2., 3.]*len(ids))


def test_files_keep_or_replace(tmp_path, capsys):
    write_results(tmp_path, *results('a', 'b'))
    assert write_results(tmp_path, *results('c'), keep=True).id.tolist() == ['a', 'b',
        'c'] and len(image_rows(tmp_path)) == 9
    assert write_results(tmp_path, *results('c'), keep=True).id.tolist() == ['a', 'b',
        'c'] and len(image_rows(tmp_path)) == 9, 'the same again'
    assert not capsys.readouterr().err
    assert write_results(tmp_path, *results('c')).id.tolist() == ['c'] and len(image_rows(tmp_path)) == 3
    assert 'held 2 other runs' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match='run the notebook without `stored`'): read_results(tmp_path/'none')


@pytest.mark.parametrize('column', ['options', 'scheme'])
def test_what_tells_rows_apart_is_kept_apart(tmp_path, column):
    for value in ('x', 'y'): write_results(tmp_path, *results('a', **{column: value}), keep=True)
    df = image_rows(tmp_path)
    assert len(read_results(tmp_path)) == 2 and len(df) == 6 and (df.arm == 'CE').all() and np.allclose(df.insertion,
        [1, 2, 3]*2)


def test_images_of_a_run_that_is_not_there_are_not_dropped(tmp_path):
    rows, images = results('a', 'b')
    write_results(tmp_path, rows[:1], images)
    assert image_rows(tmp_path).arm.isna().tolist() == [False]*3 + [True]*3
