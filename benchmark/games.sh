#!/usr/bin/env bash
# One game of the ten: the runs of its rows in the tables, by plain commands, one core each. Then
# `python benchmark/table3.py` makes the tables from what they wrote to benchmark/results/{game}/games/.
#
#     bash benchmark/games.sh BreakoutNoFrameskip-v4 1_000_000 "1 2 3"
#     bash benchmark/games.sh BreakoutNoFrameskip-v4 1_000_000 "1 2 3" "direct_.*"   # only the runs so named
#
# Arguments: the game, the steps of whatever PPO trains from scratch, the seeds of the students, and a
# pattern of names. PPO trains with the first seed alone. What is there already is not run again, and
# what was stopped goes on. In a clone without the teacher's own file the one of pretrained/ serves, save
# Pong's, which learned longer: without the results of its `teacher` a new one is trained. Two games run
# side by side on two cores.
set -euo pipefail
game=$1 budget=$2 seeds=$3 only=${4:-.*}
results=benchmark/results/$game/games weights=checkpoints/$game buffer=buffers/${game}_games.npz
teacher=$weights/teacher.pt
[[ -e $teacher || $game == Pong* ]] || teacher=pretrained/$game/ppo_high.pt
first=${seeds%% *}
export OMP_NUM_THREADS=1
# chosen on the paper's four tuning games, as docs/results.md says; the same for every game
ppo="--num-steps 128 --num-minibatches 8 --checkpoint-interval 50_000"
direct="$ppo --update-epochs 4 --learning-rate 1e-3 --clip-coef 0.2 --total-timesteps $budget"
tuned="$ppo --update-epochs 3 --learning-rate 2.5e-4 --clip-coef 0.1 --total-timesteps $((${budget//_/} * 27 / 100))"

run() {  # name, script, flags: its time, also of parts that were stopped, goes to times.txt
    local name=$1
    shift
    [[ $name =~ ^($only)$ && ! -e $results/$name/eval.json ]] || return 0
    set -- "$@" --env-id "$game" --exp-name "$name" --save-path "$weights/$name.pt" --resume --eval-steps 100_000
    mkdir -p "$results/$name"
    echo "== $name: python $*" | tee -a "$results/$name/commands.txt"
    /usr/bin/time --append --output "$results/$name/times.txt" --format "%e %U %S" python "$@"
    python benchmark/curve.py "$(ls -dt runs/"${game}__${name}__"* | head -n 1)" "$results/$name"
}

distil() {  # capacity, seed
    [[ "ad_$1_$2" =~ ^($only)$ && ! -e $buffer ]] && python collect_buffer.py --env-id "$game" \
        --teacher-path "$teacher" --buffer-path "$buffer" --num-samples 135_000 --num-envs 32
    run "ad_$1_$2" actor_distill.py --buffer-path "$buffer" --capacity "$1" --seed "$2"
}

run teacher ppo_atari_teacher.py --seed "$first" $direct
for capacity in medium low; do
    run "direct_${capacity}_$first" ppo_atari_teacher.py --capacity $capacity --seed "$first" $direct
    for seed in $seeds; do
        distil $capacity "$seed"
    done
    run "tuned_${capacity}_$first" finetune_student.py --capacity $capacity --student-path "$weights/ad_${capacity}_$first.pt" \
        --seed "$first" $tuned
done
