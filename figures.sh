#!/usr/bin/env bash
# The exact commands behind every figure. Finished runs are skipped, unfinished ones resumed, so it can be interrupted.
#
#   ./figures.sh --dry-run        print the commands, run nothing
#   ./figures.sh                  all runs on models/emoji, then the figures
#   SEEDS="1 2" ITERATIONS=60 STEPS=20 JOBS=2 ./figures.sh        fewer, shorter, two at a time
#   ./figures.sh --gpu            the paper's own setting: a GPU, Stable Diffusion v1.4 and the reward weights (5 GB)
#
# SEEDS (1 2 3 4 5), ITERATIONS (200), STEPS (50), JOBS (1), OUT (runs/figures), PYTHON (python)
set -euo pipefail
cd "$(dirname "$0")"
SEEDS=${SEEDS:-1 2 3 4 5} ITERATIONS=${ITERATIONS:-200} STEPS=${STEPS:-50} JOBS=${JOBS:-1}
OUT=${OUT:-runs/figures} PYTHON=${PYTHON:-python} DRY='' MODEL=models/emoji TASKS='compress incompress clip'
for flag in "$@"; do
  case $flag in
    --dry-run) DRY=1 ;;
    --gpu) MODEL=CompVis/stable-diffusion-v1-4 TASKS='compress incompress aesthetic' OUT=$OUT/gpu ;;
    *) echo "unknown flag $flag: --dry-run and --gpu are all" >&2; exit 2 ;;
  esac
done

# SCRIPT REWARD SEED FLAGS -> its command, quoted for the shell; or nothing where that run is finished
plan() {
  local script=$1 reward=$2 seed=$3 parent folder rows command resume=''
  shift 3
  parent=$OUT/$script$(printf '%s' "$*" | tr -d ' ')
  for folder in "$parent/${script}__${reward}__s${seed}__"*; do
    [ -f "$folder/metrics.csv" ] || continue
    rows=$(($(wc -l <"$folder/metrics.csv") - 2)) # without the header and row 0
    if [ "$rows" -ge "$ITERATIONS" ]; then
      echo "finished: $folder" >&2
      return
    fi
    [ -f "$folder/checkpoint/state.safetensors" ] && resume=$folder # the newest comes last
  done
  printf -v command '%q ' "$PYTHON" "$script.py" --reward "$reward" --seed "$seed" --model "$MODEL" --iterations "$ITERATIONS" \
    --num-steps "$STEPS" --out "$parent" "$@" ${resume:+--resume "$resume"}
  echo "${command% }"
}

commands() {
  local seed task
  for seed in $SEEDS; do
    for task in $TASKS; do
      for script in ddpo_sf ddpo_is ddpo_iskl; do plan $script "$task" "$seed"; done
    done
    plan ddpo_iskl incompress "$seed" --lr 3e-3 # Figure 3b, Table 1's bad learning rate
  done
  [ "$MODEL" = models/emoji ] || return 0 # the paper leaves RWR out
  for seed in $(echo $SEEDS | cut -d' ' -f1-3); do
    for task in compress incompress; do
      for script in rwr rwr_sparse; do plan $script "$task" "$seed"; done
    done
  done
}

figures() { # the rows of pictures are those of the first seed
  local out first=${SEEDS%% *}
  out=$(printf '%q' "$OUT")
  echo "$PYTHON plot.py curves $out --out $out/curves.png"
  echo "$PYTHON plot.py tradeoff $out --out $out/tradeoff.png"
  echo "$PYTHON plot.py progress $out/*/*__incompress__s${first}__* --out $out/progress.png"
  echo "$PYTHON plot.py trajectory $out/*/*__incompress__s${first}__* --out $out/trajectory.png"
}

if [ -n "$DRY" ]; then
  commands
  figures
else
  [ "$JOBS" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else runs on one CPU stall one another
  failed=''
  commands | tr '\n' '\0' | xargs -0 -P "$JOBS" -n 1 bash -c 'eval "$0"' || failed=1 # the others go on
  figures | bash -e
  [ -z "$failed" ] || { echo "a run failed: see above; the figures are of those that ended well" >&2; exit 1; }
fi
