#!/usr/bin/env bash
# The commands of the published runs and of their figures. A finished run is skipped and an
# interrupted one is resumed, so this script can be stopped and started again.
#
#   ./figures.sh --dry-run                print the commands, run nothing
#   ./figures.sh                          all runs, about 18 hours on 2 cores, then the figures
#   ./figures.sh table1 small_lr          the runs of these sets, then the figures they suffice for
#   OUT=results ./figures.sh figures      only the figures, here those of the published runs
#   JOBS=2 ./figures.sh                   two runs at a time
#   ITERATIONS=20 OUT=runs/short ./figures.sh bad_lr    shorter runs
#   FLAGS="--model CompVis/stable-diffusion-v1-4" OUT=runs/sd ./figures.sh table1
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")"
OUT=${OUT:-runs/figures}
JOBS=${JOBS:-1}
PYTHON=${PYTHON:-python}
FLAGS=${FLAGS:---model models/emoji --precision fp32}

# set            scripts            rewards              seeds  iterations and flags
# group needs: patch -o ddpo_is_groups.py ddpo_is.py variants/group_advantages.patch
# rwr_common needs: patch -o rwr_common.py rwr.py variants/common_draws.patch
# held_out is evaluated by results/held_out/evaluate.py when its runs have ended
# squared_kl has a third form, the term as printed: leave out "- kl.detach()" in compute_loss
RUNS="
table1           ddpo_sf            compress,incompress  1-5    200 --num-updates 4 --lr 3e-4
table1           ddpo_is,ddpo_iskl  compress,incompress  1-5    200
small_lr         ddpo_sf            compress,incompress  1-3    100
small_lr         ddpo_is            compress,incompress  1-3    200 --lr 1e-4
small_lr         ddpo_iskl          compress,incompress  1-3    100 --num-updates 1 --lr 1e-4
bad_lr           ddpo_iskl          compress             1-5    50 --lr 3e-3
one_update       ddpo_sf            compress,incompress  1-5    50 --lr 3e-4
updates_clip     ddpo_is            compress,incompress  1-3    20 --num-updates 4
updates_clip     ddpo_is            compress,incompress  1-3    20 --clip-range 1
updates_clip     ddpo_sf            compress,incompress  1-3    20 --num-updates 2 --lr 3e-4
squared_kl       ddpo_iskl          compress             1-3    30 --num-steps 20 --num-updates 1
squared_kl       ddpo_iskl          compress             1-3    30 --num-steps 20 --num-updates 2
squared_kl       ddpo_iskl          compress             1-3    30 --num-steps 20 --num-updates 1 --kl squared --kl-coef 7.7
squared_kl       ddpo_iskl          compress             1-3    30 --num-steps 20 --num-updates 2 --kl squared --kl-coef 7.7
rwr              rwr                compress,incompress  1-3    100
rwr              rwr_sparse         compress,incompress  1-3    60
rwr              rwr                incompress           1-3    30 --no-center-weights
rwr_printed      rwr,rwr_sparse     compress,incompress  1-3    30 --lr 1e-4 --no-center-weights
rwr_printed      rwr                compress             1-3    30 --lr 1e-4 --no-center-weights --beta 0
clip             ddpo_sf,ddpo_is,ddpo_iskl  clip         1-3    40
kl               ddpo_iskl          compress,incompress  1-3    60 --kl-coef 0.003
kl               ddpo_iskl          compress,incompress  1-3    60 --kl-coef 0.03
main_command_70  ddpo_iskl          compress             1-1    70
group            ddpo_is_groups     compress,incompress  1-3    30 --lr 1e-4
fresh            rwr,ddpo_iskl,ddpo_sf  compress,incompress  6-8    60
fresh            ddpo_is            compress,incompress  6-8    60 --lr 1e-4
held_out         ddpo_is            compress,incompress  1-3    60 --lr 1e-4 --prompts results/held_out/trained_on.txt
held_out         ddpo_iskl          compress,incompress  1-3    60 --prompts results/held_out/trained_on.txt
learned          ddpo_sf,ddpo_iskl  results/learned/fluent.py:fluent           1-3  40
learned          ddpo_is            results/learned/fluent.py:fluent           1-3  40 --lr 1e-4
rwr_common       rwr_common         compress,incompress  6-8    60
permuted         ddpo_is,ddpo_iskl,rwr  results/permuted/permuted.py:compress  1-3  60
permuted         ddpo_is            results/permuted/permuted.py:compress      1-3  60 --lr 1e-4
"

# the arguments of plot.py; @ is OUT
FIGURES="
pictures @/table1/*/*__s1__* --out @/figure1.png
pictures @/table1/*/*__compress__s1__* --prompt 0 10 20 --out @/figure2.png
curves @/table1 --metric eval_reward eval_align --limits 1.8 3.4 --out @/figure3.png
curves @/table1/ddpo_iskl/*__compress__* @/bad_lr --x iteration --last 50 --out @/figure3b.png
pictures @/table1/*/*__compress__s1__* --across steps --out @/figure4.png
pictures @/bad_lr/*/*__s1__* --across steps --iteration 0 10 30 50 --out @/figure5.png
curves @/table1/ddpo_is @/table1/ddpo_iskl @/small_lr --x eval_align --out @/tradeoff.png
contrast @/table1/ddpo_is @/table1/ddpo_iskl @/small_lr/ddpo_is-* @/small_lr/ddpo_sf* @/rwr/rwr --out @/contrast.png
pictures @/table1/ddpo_is*/*__compress__s1__* @/small_lr/ddpo_is-*/*__compress__s1__* --across prompts --prompt 0 1 4 6 9 11 14 15 --out @/before_after.png
pictures @/rwr/rwr/*__s1__* @/rwr_printed/rwr/*__s1__* --across prompts --prompt 0 1 4 6 9 --out @/rwr_pictures.png
pictures @/learned/*/*__s1__* --across prompts --prompt 0 1 4 6 9 11 14 15 --out @/learned.png
pictures @/held_out/evaluated/*__s1__* --across prompts --prompt 0 1 5 7 9 11 12 14 --out @/held_out.png
"

# SCRIPT REWARD SEED PARENT ITERATIONS FLAGS...: the command of a run, or nothing if it is finished
run() {
  local script=$1 reward=$2 seed=$3 parent=$4 iterations=${ITERATIONS:-$5}
  local command=("$PYTHON" "$script.py")
  local found=("$parent/${script}__${reward##*:}__s${seed}__"*)
  if ((${#found[@]})); then
    last=$(tail -n 1 "${found[0]}/metrics.csv" 2>/dev/null | cut -d, -f1) || last=0
    ((last < iterations)) || return 0
    command+=(--resume "${found[0]}" --iterations "$iterations")
  else
    command+=(--reward "$reward" --seed "$seed" --iterations "$iterations" $FLAGS "${@:6}")
    command+=(--out "$parent")
  fi
  printf '%q ' "${command[@]}"
  echo
}

commands() {
  while read -r set scripts rewards seeds iterations flags; do
    [[ " ${*:-$set} " == *" $set "* ]] || continue
    for script in ${scripts//,/ }; do
      for reward in ${rewards//,/ }; do
        for seed in $(seq ${seeds/-/ }); do
          run "$script" "$reward" "$seed" "$OUT/$set/$script${flags//[ \/]/}" "$iterations" $flags
        done
      done
    done
  done <<<"${RUNS:1:-1}"
}

figures() {
  while read -r arguments; do
    echo "$PYTHON plot.py ${arguments//@/$(printf %q "$OUT")}"
  done <<<"${FIGURES:1:-1}"
}

dry_run=
sets=()
for word in "$@"; do
  if [[ $word == --dry-run ]]; then dry_run=1; continue; fi
  [[ "${RUNS}figures " == *$'\n'"$word "* ]] || { echo "$word: no such set" >&2; exit 2; }
  sets+=("$word")
done
if [[ $dry_run ]]; then
  commands "${sets[@]}"
  figures
  exit
fi
# two threads of each run would stall one another
[[ $JOBS == 1 ]] || export OMP_NUM_THREADS=1
commands "${sets[@]}" | tr '\n' '\0' | xargs -0 -r -P "$JOBS" -n 1 bash -xc || failed=1
figures | bash -x || true  # a figure says so if its runs are missing
exit ${failed:-0}
