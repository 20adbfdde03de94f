import saelens_lite as sl


class LogSum(sl.Sparsity):
    """ReLU codes, penalised by λ Σ log(1 + f ‖W_dec‖ / ε), which counts latents rather than their strength."""

    paper = "Candès, Wakin & Boyd 2008, Enhancing sparsity by reweighted ℓ1 minimization, arXiv:0711.1612"

    class Config(sl.RuleConfig):
        coefficient: float = 1.0
        epsilon: float = 0.3

    def activation(self, pre):
        return pre.relu()

    def losses(self, step):
        strength = step.codes.value * self.at(step.decoder_norms, step.codes.latent)
        penalty = (strength / self.config.epsilon).log1p().sum() / len(step.x)
        return {"log_sum": step.warmup * self.config.coefficient * penalty}
