"""The feed-forward half of a post-norm transformer layer as one kernel."""

from pallas_kernels.feed_forward.tensorcore import Weights, feed_forward, is_faster

__all__ = ["Weights", "feed_forward", "is_faster"]
