#!/usr/bin/env bash
# Ten games times three seeds of one script that trains, as an array of Slurm:
#
#   sbatch benchmark/slurm.sh ppo_atari_teacher.py --capacity low --track
#
# Two minutes before it is preempted or out of time a job gets SIGTERM, saves, and is queued again.
#SBATCH --array=0-29
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u
games=(Breakout SpaceInvaders Qbert Seaquest MsPacman BeamRider Enduro Riverraid Freeway Pong)
game=${games[SLURM_ARRAY_TASK_ID % 10]}NoFrameskip-v4
seed=$((SLURM_ARRAY_TASK_ID / 10 + 1))
script=$1
path="checkpoints/{env_id}/${script%.py}_{capacity}_{seed}.pt"

python "$script" "${@:2}" --env-id "$game" --seed "$seed" --save-path "$path" --resume &
training=$! preempted=
trap 'preempted=yes; kill -TERM $training' TERM
wait $training
status=$?
if [ "$preempted" ]; then
    wait $training
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
