"""The policy that is trained: log-probs of a PEFT model, and optimizer updates that do not depend on how they are cut.

Letters: B rows of a batch, T completion tokens, L tokens of prompt and completion, V vocabulary."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import get_scheduler

from lora_grpo.errors import ConfigError, TrainingError
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.forward import Forward, in_mode
from lora_grpo.grpo.losses import Objective, Size, Totals, filled
from lora_grpo.grpo.optimizer import Gradients, Reach, build_optimizer, plain_optimizer, trainable_parameters
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.reference import Reference


class Policy:
    """A PEFT model, its optimizer and the GRPO objective.

    Without an optimizer, AdamW over the adapter is built; the schedule is `config`'s over `total_steps` rollout steps.
    With `config.beta`, the adapter as it is now is the reference of the KL.

    With an accelerator of several processes, each holds its own rows, as many as any other, and the whole model (DDP)
    or a shard of it (FSDP2). `prepare` and `update` are called by all, and each gradient is the one that one process
    would compute on all rows, the first process's first. Adapters held whole start from the first process's weights."""

    def __init__(
        self,
        model: PeftModel,
        config: GRPOConfig,
        *,
        accelerator: Accelerator | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        kind = str(accelerator.distributed_type.value) if accelerator else "NO"
        if kind in {"DEEPSPEED", "MEGATRON_LM"} or (kind == "FSDP" and accelerator and not accelerator.is_fsdp2):
            raise ConfigError(f"accelerate's {kind} is not supported: use plain DDP, or FSDP with fsdp_version: 2")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self._drops = _drops_out(self.model)
        self.config = config
        self.processes = Processes(accelerator)
        self.objective = Objective(config)
        self.parameters = trainable_parameters(self.model)
        for parameter in self.parameters.values():
            if not isinstance(parameter, DTensor):
                parameter.detach().copy_(self.processes.from_first(parameter.detach()))
        self.reference = Reference(self.model, wanted=config.beta > 0)
        self.gradients = Gradients(self.model, self.parameters.values(), self.processes)
        self.forward = Forward(self.model, config, self.processes, sharded=bool(self.gradients.sharded))
        self.reach = Reach(self.reference.modules, self.processes)
        self.optimizer = plain_optimizer(optimizer or build_optimizer(self.model, config), self.parameters)
        updates = config.total_steps * config.updates_per_step(self.processes.count)
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimizer, config.warmup_steps, updates)
        if config.gradient_checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    # Log-probs.

    def logprobs(self, batch: Batch) -> Tensor:
        """logp_BT of the completions under the policy, fp32, nats, at the sampling temperature; 0 where padded."""
        return self._scores(batch)[0]

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """As `logprobs`, of what the KL is measured to; see `Reference`."""
        with self.reference.in_place():
            return self._scores(batch)[0]

    def prepare(self, batch: Batch) -> Batch:
        """`batch` on this device with the old log-probs and entropies; with a KL, with the reference's log-probs too.

        To be called before the first update on the batch: the ratios of all updates are taken against these."""
        batch = batch.to(self.device)
        logp_BT, entropy_BT = self._scores(batch)
        ref_logp_BT = self.reference_logprobs(batch) if self.config.beta else None
        return replace(batch, old_logp_BT=logp_BT, entropy_BT=entropy_BT, ref_logp_BT=ref_logp_BT)

    # Updates.

    def update(self, batch: Batch, *, judge: Callable[[Batch], None] | None = None) -> dict[str, float]:
        """`num_iterations` passes over `batch`, an optimizer and a schedule step every optimizer batch of rows.

        A batch that `prepare` has not seen is prepared first; where it is one update, and nothing is dropped out, its
        old log-probs are its own forward's. `judge` gets the prepared batch before the first optimizer step: what it
        raises leaves the policy as it was. Where a pass holds several updates, the rows of all processes are
        shuffled first (the first one's global CPU generator). Returns the batch's `sampling/*` and, as means over the
        updates, `loss`, `grad_norm` (before clipping), `learning_rate` (as used) and TRL's `entropy`, `kl` and clip
        metrics. Rows that cannot move the policy are not computed; their entropy is `prepare`'s.

        Raises `ConfigError` for rows that are no multiple of an optimizer batch, or not equally many everywhere, and
        where a loss or gradient is not finite `TrainingError`, where none reaches a layer `UnsupportedAdapter`:
        weights, optimizer and schedule then stay as the last good step left them."""
        self._check_rows(len(batch))
        batch = batch.to(self.device)
        one_update = self.config.num_iterations == 1 and len(batch) == self.config.rows_per_update(1)
        # Then the policy that learns from the batch is the one that it is compared with.
        at_once = batch.old_logp_BT is None and one_update and not self._drops
        if at_once:
            batch = replace(batch, ref_logp_BT=self.reference_logprobs(batch) if self.config.beta else None)
        else:
            batch = self.prepare(batch) if batch.old_logp_BT is None else batch
            if judge:
                judge(batch)
        rollout, metrics = self._size(batch), []
        with in_mode(self.model, training=True):
            for rows in self._optimizer_batches(batch):
                step, seen = self._step(rows, rollout, judge if at_once else None)
                metrics.append(step)
        means = {name: sum(one[name] for one in metrics) / len(metrics) for name in metrics[0]}
        return means | self.processes.metrics(self.objective.observe_sampling(seen if at_once else batch))

    def _step(self, rows: Batch, whole: Size, judge: Callable[[Batch], None] | None) -> tuple[dict[str, float], Batch]:
        self.gradients.zero()
        totals = Totals(self._size(rows), whole, self.config.max_completion_length)
        self.reach.begin()
        local_loss, logp_BT, entropy_BT = self._accumulate(rows, totals)
        self.reach.end()
        if rows.old_logp_BT is None:
            rows = replace(rows, old_logp_BT=logp_BT, entropy_BT=entropy_BT)
        try:
            if judge:
                judge(rows)
            loss, grad_norm = self.processes.sum(local_loss).item(), self.gradients.add_up()
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                said = f"loss {loss}, gradient norm {grad_norm}: the step was not taken"
                raise TrainingError(f"{said}; lower learning_rate, or look for non-finite log-probs in the batch")
            self.reach.check()
        except BaseException:
            self.optimizer.zero_grad()
            raise
        self.gradients.clip(grad_norm, self.config.max_grad_norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        observed = self.objective.observe(logp_BT, entropy_BT, rows)
        step = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        return step | self.processes.metrics(observed), rows

    def _accumulate(self, rows: Batch, totals: Totals) -> tuple[Tensor, Tensor, Tensor]:
        """Adds this process's gradient of one optimizer batch; its part of the loss, logp_BT and entropy_BT."""
        loss = torch.zeros((), device=self.device)
        wanted_B = self.objective.needs_gradient(rows)
        at_once = rows.old_logp_BT is None
        if at_once:
            logp_BT, entropy_BT = self._scores(rows, ~wanted_B)
        else:
            logp_BT, entropy_BT = filled(rows.old_logp_BT).clone(), filled(rows.entropy_BT).clone()
        micro_batches = self.forward.micro_batches(rows, wanted_B)
        for number, (index, micro, packed) in enumerate(micro_batches, 1):
            self.gradients.add_up_with(last=number == len(micro_batches))
            logp, entropy = self.forward(micro, packed=packed)
            if at_once:
                micro = replace(micro, old_logp_BT=logp.detach())
            part = self.objective.value(logp, micro, totals)
            if self.reach.watching and logp.requires_grad:
                logp.retain_grad()
            with self.forward.backward():
                part.backward()
            if self.reach.watching:
                self.reach.saw(logp.grad, micro.position_ids_BL[:, micro.prompt_length :])
            loss += part.detach()
            logp_BT[index, : micro.completion_length] = logp.detach()[: len(index)]
            entropy_BT[index, : micro.completion_length] = entropy[: len(index)]
        return loss, logp_BT, entropy_BT

    def _optimizer_batches(self, batch: Batch) -> Iterator[Batch]:
        """Of each update's rows, those that this process holds: the updates are the same however many share them."""
        local, count = len(batch), self.processes.count
        order = torch.arange(local * count)
        if local > self.config.rows_per_update(1):
            order = self.processes.from_first(torch.randperm(local * count).to(self.device)).cpu()
        for _ in range(self.config.num_iterations):
            for update in order.split(self.config.rows_per_update(count)):
                own = update[update // local == self.processes.index] % local
                yield batch.select(own.to(self.device))

    def _size(self, rows: Batch) -> Size:
        """Over all processes."""
        counts = torch.stack([torch.tensor(len(rows), device=self.device), rows.mask_BT.sum()])
        return Size(*self.processes.sum(counts).tolist())

    # The model.

    @torch.no_grad()
    def _scores(self, batch: Batch, wanted_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logp_BT and entropy_BT, 0 where padded and in rows that are not wanted."""
        batch = batch.to(self.device)
        logp_BT, entropy_BT = torch.zeros((2, *batch.mask_BT.shape), device=self.device)
        wanted_B = batch.mask_BT.new_ones(len(batch)) if wanted_B is None else wanted_B
        with in_mode(self.model, training=False):
            for index, micro, packed in self.forward.micro_batches(batch, wanted_B):
                logp, entropy = self.forward(micro, packed=packed)
                logp_BT[index, : micro.completion_length] = logp[: len(index)]
                entropy_BT[index, : micro.completion_length] = entropy[: len(index)]
        return logp_BT, entropy_BT

    # Checks.

    def _check_rows(self, rows: int) -> None:
        least_negated, most = self.processes.max(torch.tensor([-rows, rows], device=self.device)).tolist()
        if -least_negated != most:
            raise ConfigError(f"processes have between {-least_negated} and {most} rows: give each the same number")
        local_rows = self.config.rows_per_update(1)
        if rows == 0 or rows % local_rows:
            batch = f"per_device_train_batch_size * gradient_accumulation_steps = {local_rows} rows per process"
            raise ConfigError(f"{rows} rows are not a multiple of one optimizer batch, {batch}")


def _drops_out(model: nn.Module) -> bool:
    """Whether anything is dropped out in training, by a layer or by a rate of the configuration."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    rates = [value for name, value in (text.to_dict() if text else {}).items() if "drop" in name]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
