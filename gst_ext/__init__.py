"""The package behind the scripts: the compiled operators, and modules that are imported by name.

    import gst_ext
    gst_ext.ebn_score(gamma, beta)
    gst_ext.masked_conv2d(x, weight, bias, live_out, live_in, stride, padding)
    gst_ext.bn_act(x, gamma, beta, running_mean, running_var)
    gst_ext.masked_conv_bn_act(x, weight, bias, gamma, beta, running_mean, running_var)
"""
from .ops import bn_act, ebn_score, masked_conv2d, masked_conv_bn_act

__all__ = ["bn_act", "ebn_score", "masked_conv2d", "masked_conv_bn_act"]
