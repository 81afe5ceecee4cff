#!/usr/bin/env bash
# One game of the ten: the runs of its rows in the tables, by plain commands, one core each. Each is
# recorded in benchmark/results/games/, from which `python benchmark/tables.py` makes the tables.
#
#     bash benchmark/games.sh BreakoutNoFrameskip-v4 1_000_000 "1 2 3"
#     bash benchmark/games.sh BreakoutNoFrameskip-v4 1_000_000 "1 2 3" "tuned_.*"   # only the runs so named
#
# Arguments: the game, the steps of what PPO trains from scratch, with the first seed alone, the seeds of
# the students, and a pattern of names. What is recorded is not run again, and what was stopped goes on.
# Without a file of the teacher that of pretrained/ serves, save Pong's, which learned longer.
set -euo pipefail
trap 'exit 130' INT TERM
game=$1 budget=$2 seeds=$3 only=${4:-.*}
results=benchmark/results/games/${game%NoFrameskip-v4}.jsonl weights=checkpoints/$game
buffer=buffers/${game}_games.npz teacher=$weights/teacher.pt first=${seeds%% *}
[[ -e $teacher || $game == Pong* ]] || teacher=pretrained/$game/ppo_high.pt
export OMP_NUM_THREADS=1
# chosen by short trials on the paper's four tuning games; the same for every game
direct="--num-steps 128 --num-minibatches 8 --update-epochs 4 --learning-rate 1e-3 --clip-coef 0.2"
direct="$direct --checkpoint-interval 50_000 --total-timesteps $budget --seed $first"

wanted() {  # name
    [[ $1 =~ ^($only)$ ]] && ! grep -qs "^{\"name\": \"$1\"," "$results"
}

run() {  # name, script, flags; the time of what was stopped counts too
    local name=$1 times=$weights/$1.times
    wanted "$name" || return 0
    set -- "${@:2}" --env-id "$game" --exp-name "$name" --save-path "$weights/$name.pt" --resume --eval-steps 100_000
    mkdir -p "$weights"
    echo "== $name: python $*"
    /usr/bin/time --quiet --append --output "$times" --format %U python "$@"
    python benchmark/record.py "$(ls -dt runs/"${game}__${name}__"* | head -n 1)" "$results" --name "$name" \
        --command "python $*" --seconds "$(awk '{ sum += $1 } END { print sum }' "$times")"
}

run teacher ppo_atari_teacher.py $direct
for capacity in medium low; do
    run "direct_${capacity}_$first" ppo_atari_teacher.py --capacity $capacity $direct
    for seed in $seeds; do
        if wanted "ad_${capacity}_$seed" && [[ ! -e $buffer ]]; then
            python collect_buffer.py --env-id "$game" --teacher-path "$teacher" --buffer-path "$buffer.part.npz" \
                --num-samples 135_000 --num-envs 32
            mv "$buffer.part.npz" "$buffer"
        fi
        run "ad_${capacity}_$seed" actor_distill.py --buffer-path "$buffer" --capacity $capacity --seed "$seed"
    done
    # these begin with the student of pretrained/, unless checkpoints/ has one at the default path; other
    # seeds than the students', or the evaluation before would be the games by which that one was chosen
    for seed in 4 5 6; do
        tuned="finetune_student.py --capacity $capacity --seed $seed --total-timesteps"
        run "tuned_${capacity}_$seed" $tuned 270_000
        run "tuned1m_${capacity}_$seed" $tuned 1_000_000
        run "nopull_${capacity}_$seed" $tuned 270_000 --kl-coef 0
        run "slower_${capacity}_$seed" $tuned 270_000 --learning-rate 2.5e-4
    done
done
