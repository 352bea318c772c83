"""Networks, and the Denoiser that makes one of them a function of (z, log-SNR, condition) -> x_hat."""
