# On the GPU machine: unpack what came, start the processes, leave them. JOBS="E0 mE0 C9" SECONDS_LEFT=700 FOR=15
: "${OUT:?}" "${JOBS:?}" "${SECONDS_LEFT:?}" "${FOR:?}"
# all folders before Python starts, which remembers what is missing
mkdir -p /tmp/packs /tmp/work/files /tmp/root/data /tmp/site
cp -r .gpu/encoder /tmp/packs/
python3 - <<'P'
import lzma, pickle, numpy as np
*parts, end = pickle.load(open('/tmp/packs/encoder/planes', 'rb'))
cut = [np.frombuffer(lzma.decompress(p) if k >= 2 else p, np.uint8) for k, p in enumerate(parts)]
open('/tmp/packs/encoder/model.safetensors', 'wb').write(np.stack(cut, 1).tobytes() + end)
P
cp -r lico settings.ini pyproject.toml .ci/lease/runner.py /tmp/root/
echo $(($(date +%s) + SECONDS_LEFT)) > /tmp/work/deadline
nvidia-cuda-mps-control -d
cd /tmp/root
export LICO_ROOT=/tmp/root PYTHONPATH=/tmp/root:/tmp/site HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
setsid nohup python3 runner.py $JOBS > /tmp/work/out 2>&1 < /dev/null &
cd - && . .ci/lease/next.sh
