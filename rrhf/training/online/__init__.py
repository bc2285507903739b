"""Training on what the policy writes itself: rollouts, the experience made of them, its stream.

    rollout -> experience -> stream (-> ptx, ema) -> the loop -> the next rollout

`rrhf.training.online.ppo` puts the parts together.
"""
