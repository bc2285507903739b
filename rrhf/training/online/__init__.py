"""Trains on the policy's own responses: rollouts, experience, and the stream of experience.

    rollout -> experience -> stream (-> ptx, ema) -> the loop -> the next rollout

`rrhf.training.online.ppo` puts the parts together.
"""
