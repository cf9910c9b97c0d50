#!/usr/bin/env bash
# Train. ./launch.sh                                         the quick start: sets up, makes data, trains, generates
#        ./launch.sh CONFIG.yaml [section.key=value ...]     any config; --help lists the launcher's options
#        ./launch.sh --keys [section]                        the keys of configs, with types, defaults and meanings
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$root/tools/setup.sh"
# The modules are this checkout's, whatever lies in the caller's folder.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
if [ $# -gt 0 ]; then
  exec "$root/.venv/bin/python" -m megastruct.start "$@" # from the caller's folder: its paths are meant
fi

cd "$root"
python=.venv/bin/python

data=data/sample
$python tools/make_sample_corpus.py --output $data/text
$python tools/train_tokenizer.py --input $data/text --output $data/tokenizer --vocab-size 2048
$python tools/prepare_data.py --input $data/text --tokenizer $data/tokenizer.model --output $data/tokens \
  --validation-fraction 0.02
$python -m megastruct.start configs/run/quickstart.yaml
echo "a few generated words:"
$python tools/generate.py runs/quickstart --prompt "The file" --max-new-tokens 40
