#!/usr/bin/env bash
# The exact commands of the whole set of runs and their figures. A finished run is skipped, an
# unfinished one is resumed, so this script can be interrupted and started again.
#
#   ./figures.sh --dry-run             print the commands, run nothing
#   ./figures.sh                       all sets, about 20 hours on 2 cores, then the figures
#   ./figures.sh table1 small_lr       these sets alone, then the figures
#   ./figures.sh plots                 the figures alone, from the runs that are there
#   JOBS=2 SEEDS="1 2" ./figures.sh    two runs at a time, fewer seeds
#   JOBS=15 ./figures.sh               on one large GPU with 16 CPU cores (15 runs took 52 GB)
#   ./figures.sh --gpu table1          the paper's own model and tasks: Stable Diffusion v1.4
#
# SEEDS (1 2 3 4 5; a set that needs three takes the first three), JOBS (1), OUT (runs/figures),
# PYTHON (python)
set -euo pipefail
cd "$(dirname "$0")"
SEEDS=${SEEDS:-1 2 3 4 5}
JOBS=${JOBS:-1}
OUT=${OUT:-runs/figures}
PYTHON=${PYTHON:-python}
MODEL="models/emoji --precision fp32"
TASKS="compress incompress"
ALL_SETS="table1 one_update small_lr bad_lr clip kl rwr rwr_printed rwr_many"
DRY_RUN=""
SETS=""

for word in "$@"; do
  case $word in
    --dry-run) DRY_RUN=yes ;;
    --gpu)
      MODEL=CompVis/stable-diffusion-v1-4
      TASKS="compress incompress aesthetic"
      OUT=$OUT/gpu
      ;;
    table1 | one_update | small_lr | bad_lr | clip | kl | rwr | rwr_printed | rwr_many | plots) SETS="$SETS $word" ;;
    *)
      echo "unknown word $word: --dry-run, --gpu, plots, or a set: $ALL_SETS" >&2
      exit 2
      ;;
  esac
done
SETS=${SETS:-$ALL_SETS}
FEW_SEEDS=$(echo $SEEDS | cut -d' ' -f1-3)

# run SET SCRIPT REWARD SEED ITERATIONS FLAGS...: print the command, or nothing if it is finished
run() {
  local set=$1 script=$2 reward=$3 seed=$4 iterations=$5
  shift 5
  local parent=$OUT/$set/$script$(printf '%s' "$@" | tr -cd 'a-zA-Z0-9.-')
  local folder last
  for folder in "$parent/${script}__${reward}__s${seed}__"*; do
    [ -f "$folder/args.json" ] || continue
    last=$(tail -n 1 "$folder/metrics.csv" 2>/dev/null | cut -d, -f1)
    if [ "$last" = "$iterations" ] && [ -d "$folder/checkpoint" ]; then
      echo "finished: $folder" >&2
    else
      echo "$PYTHON $script.py --resume $folder"
    fi
    return
  done
  echo "$PYTHON $script.py --reward $reward --seed $seed --iterations $iterations" \
    "--model $MODEL --out $parent $*"
}

# Table 1 as it is printed: Figures 1 to 4
table1() {
  local seed task
  for seed in $SEEDS; do
    for task in $TASKS; do
      run table1 ddpo_sf "$task" "$seed" 200 --num-updates 4 --lr 3e-4
      run table1 ddpo_is "$task" "$seed" 200
      run table1 ddpo_iskl "$task" "$seed" 200
    done
  done
}

# one update per iteration, as the paper's own code is configured
one_update() {
  local seed task
  for seed in $SEEDS; do
    for task in $TASKS; do
      run one_update ddpo_sf "$task" "$seed" 200 --num-updates 1 --lr 3e-4
      run one_update ddpo_is "$task" "$seed" 200 --num-updates 1
    done
  done
}

# SF as the unbiased estimator with a small step, IS with the same step as its control, and ISKL
# with both
small_lr() {
  local seed task
  for seed in $FEW_SEEDS; do
    for task in $TASKS; do
      run small_lr ddpo_sf "$task" "$seed" 200 --num-updates 1 --lr 1e-4
      run small_lr ddpo_is "$task" "$seed" 200 --lr 1e-4
      run small_lr ddpo_iskl "$task" "$seed" 200 --num-updates 1 --lr 1e-4
    done
  done
}

# the paper's bad learning rate: Figures 3b and 5
bad_lr() {
  local seed
  for seed in $SEEDS; do
    run bad_lr ddpo_iskl compress "$seed" 200 --lr 3e-3
  done
}

# the CLIP score as the reward, in place of the paper's third task
clip() {
  local seed script
  for seed in $FEW_SEEDS; do
    for script in ddpo_sf ddpo_is ddpo_iskl; do
      run clip "$script" clip "$seed" 100
    done
  done
}

# the weight of the KL penalty; 0 is IS with its KL logged
kl() {
  local seed task coefficient
  for seed in $FEW_SEEDS; do
    for task in compress incompress; do
      for coefficient in 0 0.001 0.003 0.01 0.03; do
        run kl ddpo_iskl "$task" "$seed" 100 --kl-coef "$coefficient"
      done
    done
  done
}

# the RWR pair at its defaults but for the iterations, and without the baseline
rwr() {
  local seed task
  for seed in $FEW_SEEDS; do
    for task in compress incompress; do
      run rwr rwr "$task" "$seed" 100
      run rwr rwr_sparse "$task" "$seed" 100
    done
    run rwr rwr incompress "$seed" 100 --no-center-weights
  done
}

# Algorithms 1 and 2 as printed, and their control: with equal weights
rwr_printed() {
  local seed task
  local flags="--lr 1e-4 --no-center-weights"
  for seed in $FEW_SEEDS; do
    for task in compress incompress; do
      run rwr_printed rwr "$task" "$seed" 200 $flags
      run rwr_printed rwr_sparse "$task" "$seed" 200 $flags
    done
    run rwr_printed rwr compress "$seed" 200 $flags --beta 0
  done
}

# the same with many samples
rwr_many() {
  local seed task
  local flags="--prompts results/rwr_many/eight.txt --guidance-scale 1 --num-samples 256
    --samples-per-prompt 32 --num-updates 8 --lora-rank 32 --lr 5e-4 --save-every 1
    --no-center-weights"
  for seed in $FEW_SEEDS; do
    for task in compress incompress; do
      run rwr_many rwr "$task" "$seed" 6 $flags --beta 100
      run rwr_many rwr_sparse "$task" "$seed" 6 $flags --quantile 0.96
    done
  done
}

# the figures and tables of the sets that have runs; rows of pictures are those of the first seed
plots() {
  local first=${SEEDS%% *}
  local pictures="$OUT/table1/*/*__compress__s${first}__*"
  if [ -n "$DRY_RUN" ] || [ -d "$OUT/table1" ]; then
    echo "$PYTHON plot.py curves $OUT/table1 --out $OUT/figure3.png"
    echo "$PYTHON plot.py progress $OUT/table1/*/*__s${first}__* --out $OUT/figure1.png"
    echo "$PYTHON plot.py progress $pictures --prompt-index 0 10 20 --out $OUT/figure2.png"
    echo "$PYTHON plot.py trajectory $pictures --out $OUT/figure4.png"
  fi
  if [ -n "$DRY_RUN" ] || [ -d "$OUT/bad_lr" ]; then
    echo "$PYTHON plot.py curves $OUT/table1/ddpo_iskl/*__compress__* $OUT/bad_lr" \
      "--x iteration --out $OUT/figure3b.png"
    echo "$PYTHON plot.py trajectory $OUT/bad_lr/*/*__s${first}__*" \
      "--iteration 0 50 100 200 --out $OUT/figure5.png"
  fi
  if [ -n "$DRY_RUN" ] || [ -d "$OUT/small_lr" ]; then
    echo "$PYTHON plot.py tradeoff $OUT/table1/ddpo_is* $OUT/small_lr --baseline 'DDPO-IS, lr 3e-4' --out $OUT/tradeoff.png"
    echo "$PYTHON plot.py equal $OUT/table1 $OUT/small_lr --baseline 'DDPO-IS, lr 3e-4' --out $OUT/equal.md"
  fi
  if [ -n "$DRY_RUN" ] || [ -d "$OUT/rwr" ]; then
    echo "$PYTHON plot.py tradeoff $OUT/small_lr/ddpo_is* $OUT/table1/ddpo_iskl $OUT/rwr/rwr $OUT/rwr/rwr_sparse --out $OUT/rwr.png"
  fi
  if [ -n "$DRY_RUN" ] || [ -d "$OUT/kl" ]; then
    echo "$PYTHON plot.py tradeoff $OUT/kl --x kl_ref --baseline 'DDPO-ISKL, kl coef 0' --out $OUT/kl.png"
  fi
  echo "$PYTHON plot.py table $OUT --out $OUT/table.md"
}

if [ -n "$DRY_RUN" ]; then
  for name in $SETS; do
    $name
  done
  plots
else
  # two threads each would stall one another
  [ "$JOBS" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  failed=""
  for name in $SETS; do
    [ "$name" = plots ] || $name
  done | tr '\n' '\0' | xargs -0 -r -P "$JOBS" -n 1 bash -c || failed=yes
  plots | bash -e
  if [ -n "$failed" ]; then
    echo "a run failed, see above; the figures show those that ended well" >&2
    exit 1
  fi
fi
