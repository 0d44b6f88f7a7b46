#!/usr/bin/env bash
# Everything, on synthetic CTs: HSENet's four stages and all evaluations; its parts took about half an hour on two cores, one by one.
# Sets up the environment first; a stage that is finished is not trained again, the evaluations are made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh
. .venv/bin/activate

# One that was interrupted is continued.
for name in clip1 clip2 mrg vqa; do torchrun train.py --stage "$name" --resume auto; done
python evaluate.py --task retrieval
python evaluate.py --task zeroshot
python evaluate.py --task retrieval --run runs/clip2-hsenet
python evaluate.py --task zeroshot --run runs/clip2-hsenet
python evaluate.py --task mrg
python evaluate.py --task vqa
