#!/usr/bin/env bash
# Everything, on synthetic CTs: HSENet's four stages and all evaluations; its parts took about half an hour on two cores, one by one.
# Sets up the environment first; what is finished already is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh
. .venv/bin/activate

stage() { # one that was interrupted is continued
    local resume=()
    [ -f "runs/$1-hsenet/checkpoints/last" ] && ! finished "$1" && resume=(--resume)
    torchrun train.py --stage "$1" "${resume[@]}"
}
finished() { # the last checkpoint is the last step
    python - "runs/$1-hsenet" <<'PYTHON'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
total = json.loads((run / "config.json").read_text())["total_steps"]
sys.exit((run / "checkpoints/last").read_text().strip() != f"step-{total:06d}")
PYTHON
}

for name in clip1 clip2 mrg vqa; do stage $name; done
python evaluate.py --task retrieval
python evaluate.py --task zeroshot
python evaluate.py --task retrieval --run runs/clip2-hsenet
python evaluate.py --task zeroshot --run runs/clip2-hsenet
python evaluate.py --task mrg
python evaluate.py --task vqa
