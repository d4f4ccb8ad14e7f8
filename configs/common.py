"""Every field of a run, its unit and its reason. Recipes change what differs.

A recipe is a file with `get_config(variant='')`; it starts from `get_config`
here. Fields may be overridden on the command line: --config.optim.lr=1e-6.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Defaults: the official Diffusion-DPO settings for Stable Diffusion 1.5."""
  c = ml_collections.ConfigDict()
  # What to train: preference | denoise | autoencode | classify | reward.
  c.task = 'preference'
  # Order of the data, noise, timesteps, dropout and sampling follow from it.
  c.seed = 0
  c.model = _model()
  c.data = _data()
  c.noise = _noise()
  c.objective = _objective()
  c.lora = _lora()
  c.denoise = _denoise()
  c.vae = _vae()
  c.classifier = _classifier()
  c.reward = _reward()
  c.optim = _optim()
  c.train = _train()
  c.mesh = _mesh()
  c.eval = _eval()
  c.export = _export()
  c.lock()
  return c


def _model():
  """What is trained, and how it is computed and kept."""
  c = ml_collections.ConfigDict()
  # The policy's start and the reference: a folder in the diffusers layout, a
  # gs:// path to one, a hub id (org/name), or an original single file.
  c.folder = ''
  # Of a hub id: branch, tag or commit; the commit is recorded.
  c.revision = ''
  # '' takes full precision where there is some; 'fp16' the half-size files.
  c.variant = ''
  # Of a single file: a diffusers folder of the same architecture (without
  # weights will do), or a folder with CLIP's tokenizer.
  c.configs = ''
  # With the latter, for SD 2.x, which of the two it is: epsilon (512 pixels)
  # or v_prediction (768 pixels); nothing in the file tells.
  c.prediction_type = ''
  # Components that start from random weights: unet, vae, text_encoder.
  c.random_init = ()
  # Dtype of compute, float32 | bfloat16; errors, the statistics of norms,
  # softmax, schedule and loss are float32 whatever it is.
  c.dtype = 'float32'
  # With bfloat16: dtype of the sums beside the blocks, '' (bfloat16 as well) or
  # float32, which takes more memory.
  c.residual_dtype = ''
  # The UNet's attention: auto (splash on TPU, cudnn on GPU with bfloat16, xla
  # elsewhere) | xla | cudnn | splash.
  c.attention = 'auto'
  # Loop over the layers of a deep transformer (SDXL) in the compiled program
  # too, which makes it much smaller: auto (on accelerators) | always | never.
  c.stack_layers = 'auto'
  # What the backward pass of a block computes again to save memory: none |
  # full (all, a forward pass more) | dots (all but convolutions and products
  # with weights) | names (all but the attentions' sums and the widest product).
  c.remat = 'none'
  # How the reference is computed beside the policy: loop (the same compiled
  # code makes both: equal weights, equal errors) | separate (two passes, which
  # XLA rounds apart in bfloat16: a margin of chance at beta 5000) | revalued
  # (separate, and a third pass for the policy's value) | auto (separate for
  # float32 without remat, else loop).
  c.ref_path = 'auto'
  # What the reference is stored in: auto (kernels in the dtype of compute, the
  # same bits as from float32) | float32 | bfloat16 | int8 | float8_e4m3fn.
  # With bfloat16 and compute in float32 the policy starts from the weights
  # rounded alike, so that both start equal. In eight bits (a byte a weight less
  # than bfloat16) they do not: at beta 5000 the first margins are then mostly
  # rounding.
  c.ref_dtype = 'auto'
  # Folder of dpo_jax.tools.reference: its errors, computed once, take the place
  # of the reference in memory and in compute; '' is off.
  c.ref_errors = ''
  # What the policy's own weights are stored in, float32 | bfloat16 (updates
  # are then rounded up or down at random, and both start from rounded weights).
  c.param_dtype = 'float32'
  return c


def _data():
  """Where the pairs come from, and what becomes of them."""
  c = ml_collections.ConfigDict()
  # Folders of dpo_jax.tools.prepare, separated by commas; or, for small data,
  # parquet files in Pick-a-Pic's schema: a file, a folder or a glob.
  c.path = ''
  # Of several folders the weights in the mixture; () is their sizes.
  c.weights = ()
  # Share of the captions (by a hash of the caption) kept for evaluation.
  c.holdout = 0.02
  # Prepared folders to evaluate on instead (the validation split, say); what
  # has a caption of theirs is not trained on.
  c.eval_path = ''
  # Train from the latents and text states of folders that have them (prepare
  # --model); False decodes and encodes pictures all the same.
  c.use_cache = True
  # Latents are a sample of the VAE's posterior, drawn afresh each epoch as in
  # the authors' code, or its mean.
  c.posterior = 'sample'
  # Side of the square training images, pixels.
  c.resolution = 512
  # Random or centre crop, and horizontal flips: the same for both images.
  c.random_crop = True
  c.flip = False
  # Probability that a pair loses its caption (Wallace et al. use 0.2).
  c.prompt_dropout = 0.2
  # Share of the training pairs (by a hash of their ids) whose winner and loser
  # are swapped: for experiments with wrong labels. 0 is off.
  c.label_noise = 0.0
  # Of prepared folders that tools.label has scored: the score that decides who
  # wins a training pair (score_pickscore, say; Wallace et al., section 5.4), ''
  # for the labels of the records. Held-out pairs keep theirs.
  c.winner = ''
  # Keep the training pairs on which at least min_agree of these scores choose
  # what the label says: ('score_pickscore', 'score_hpsv2').
  c.consensus = ()
  c.min_agree = 0
  # Of each caption only so many pairs, those whose scores by `winner` differ
  # the most: 1 is the best picture against the worst. 0 is all.
  c.per_caption = 0
  # What a lost caption becomes: empty (the encoding of '') or zeros (what
  # diffusers' SDXL pipelines use as the unconditional branch).
  c.dropped_prompt = 'empty'
  # SDXL's sizes: constant (the resolution, no crop, as in the authors' code)
  # or true_size (each image's own size and crop).
  c.micro_cond = 'constant'
  return c


def _noise():
  """The timesteps."""
  c = ml_collections.ConfigDict()
  # Timesteps to train on: [t_min, t_max), t_max 0 being all; or these only.
  c.t_min = 0
  c.t_max = 0
  c.timesteps = ()
  # What the errors at a timestep are multiplied by, mean 1 over those drawn:
  # uniform (1, as in the authors' code) | min_snr | bins.
  c.weighting = 'uniform'
  # Of min_snr: the largest weight in terms of x_0.
  c.min_snr_gamma = 5.0
  # Of bins: a weight for each of so many equal ranges of the timesteps.
  c.weights = ()
  # Rescale the schedule so that its last step is pure noise (SDXL-Turbo).
  c.zero_terminal_snr = False
  return c


def _objective():
  """The loss of a pair."""
  c = ml_collections.ConfigDict()
  # dpo | ipo | hinge | cdpo | robust | soft | smpo | dmpo | mapo | kto | linear
  # | sft | duo, with that function's numbers by name (dpo_jax/objectives).
  c.name = 'dpo'
  c.numbers = ml_collections.ConfigDict({'beta': 5000.0})
  # Scale of the logged implicit rewards; for dpo keep it equal to beta.
  c.reward_beta = 5000.0
  # SDPO's safeguard of the winner, of objectives of pairs: its mu (0.9 for SD
  # 1.5, 0.6 for SDXL); 0 is off.
  c.safeguard = 0.0
  # Added: so many times the winner's error.
  c.sft_weight = 0.0
  # beta-DPO: how strongly beta follows the batch's margin (0.6 in its paper),
  # 0 is off; and the decay of the running margin it is compared with.
  c.auto_beta = 0.0
  c.auto_beta_decay = 0.9
  # Of soft and smpo, where the probability that the winner is better comes
  # from: '' (the label's confidence) | score_NAME (a score of the data), which
  # becomes sigmoid(score_scale * difference).
  c.scores = ''
  c.score_scale = 1.0
  # kto and auto_beta compare with a mean over the batch; with train.accumulate
  # over each microbatch.
  # Of kto on pairs: one picture of each, the winner with this probability (0.8
  # in the authors' code); 0 takes both.
  c.liked_share = 0.0
  # The reference: frozen | ema (a running mean of the policy, with ref_decay) |
  # sync (the policy again after each ref_every steps).
  c.ref_update = 'frozen'
  c.ref_decay = 0.999
  c.ref_every = 200
  return c


def _lora():
  """Low-rank adapters, trained instead of the UNet."""
  c = ml_collections.ConfigDict()
  # 0 trains the UNet itself.
  c.rank = 0
  # The adapters' sum is scaled by alpha / rank; 0 is rank.
  c.alpha = 0.0
  # Which dense layers have one: a regex on their kernels' names. Attention and
  # feed-forward of all transformers.
  c.targets = (
    r'/attn[12]/(to_q|to_k|to_v|to_out_0)/kernel$|/ff/net_(0/proj|2)/kernel$'
  )
  # Probability that a number of a layer's input does not reach its adapter.
  c.dropout = 0.0
  # Train magnitudes of the weights' columns too (DoRA).
  c.dora = False
  return c


def _denoise():
  """Of task denoise."""
  c = ml_collections.ConfigDict()
  # Task denoise: Min-SNR weighting of timesteps, 5 in its paper; 0 is off.
  c.min_snr_gamma = 0.0
  return c


def _vae():
  """Of task autoencode."""
  c = ml_collections.ConfigDict()
  # Task autoencode: weight of the KL term, in nats a picture.
  c.kl_weight = 1e-6
  return c


def _classifier():
  """Of task classify."""
  c = ml_collections.ConfigDict()
  # Task classify: channels of the convolutional and of the colour branch.
  c.widths = (16, 32, 64)
  c.palette = ()
  # Its augmentation: noise and gain in [-1, 1] units, share of a box blur,
  # shift in pixels, each at most.
  c.noise = 0.1
  c.gain = 0.1
  c.blur = 0.8
  c.shift = 3
  return c


def _reward():
  """Of task reward (Yoon et al., 2023); data.path names labels."""
  c = ml_collections.ConfigDict()
  # time (of x_t, t) | clean (x_0) | features (of pixels, by a CLIP's folder).
  c.kind, c.clip = 'clean', ''
  c.space = 'pixels'  # | latents of model.folder
  # ensemble (of networks) | union (one, on the labels of all) | single.
  c.variant = 'ensemble'
  c.networks = 5
  # Labels of each class a network, benign ones of its own; 0: as of the rarer.
  c.per_class = 0
  # bce | pairwise (benign against malign), and of bce the weight of the benign:
  # below 1 passing a malign one costs 1 / it times more.
  c.loss = 'bce'
  c.benign_weight = 1.0
  # Channels of the levels, each of half the side; residual blocks of each;
  # heads of the attention that pools (of time); groups of the norms.
  c.widths = (32, 64, 128)
  c.depth = 1
  c.num_heads = 4
  c.norm_num_groups = 8
  # Of each label so many pictures: itself, and others turned (degrees), cropped
  # and changed in colour (shares) by this at most, beside data.flip.
  c.copies = 1
  c.rotation = 0.0
  c.crop = 0.0
  c.colour = 0.0
  return c


def _optim():
  """The optimizer."""
  c = ml_collections.ConfigDict()
  # adamw | adafactor.
  c.name = 'adamw'
  # Regex of the UNet's parameters to train, others stay as they are; '' is all.
  c.trainable = ''
  # ((regex, factor), ...): the rate of parameters that match is multiplied by
  # the factor; the first match counts, what none matches has 1.
  c.rate_factors = ()
  # Peak learning rate: the authors' launchers use 1e-8 a pair of the batch.
  c.lr = 2.048e-5
  # constant | linear | cosine, after a linear warmup of so many steps.
  c.schedule = 'constant'
  c.warmup_steps = 500
  # Length of the decay in steps, warmup included; 0 is train.num_steps.
  c.decay_steps = 0
  c.b1 = 0.9
  c.b2 = 0.999
  c.eps = 1e-8
  # AdamW's first moment: float32 | bfloat16 (2 bytes a weight less).
  c.mu_dtype = 'float32'
  # Adafactor's updates scaled by the weights' norms; the authors do without.
  c.parameter_scale = False
  c.weight_decay = 1e-2
  # Global gradient norm; 0 is off.
  c.clip_norm = 1.0
  # Keep the optimizer's state in the host's memory: 8 bytes a weight less on
  # the device with AdamW, for 16 that cross to it and back in every step.
  c.offload = False
  # Decay of a running mean of the weights, which is then exported; 0 is off.
  c.ema_decay = 0.0
  return c


def _train():
  """The loop."""
  c = ml_collections.ConfigDict()
  # Optimizer steps.
  c.num_steps = 2000
  # Pairs (or images) a step, over all devices and microbatches.
  c.batch_size = 2048
  # Microbatches a step, to fit into memory; the gradient is the same.
  c.accumulate = 1
  # Winners, then losers, with nothing kept between: half the activations of a
  # pair for a forward pass more.
  c.sequential = False
  # In steps. Checkpoints fall on log lines, so that a resumed log has no seam.
  c.log_every = 10
  c.eval_every = 250
  c.checkpoint_every = 100
  # Newest checkpoints kept.
  c.keep = 3
  # Where compiled programs are kept for a run that goes on: auto
  # (WORKDIR/compiled on an accelerator) | a folder or gs:// path | '' (not).
  c.compile_cache = 'auto'
  # Trace so many steps from this one on with JAX's profiler, into
  # WORKDIR/profile; from 0 is off.
  c.profile_from = 0
  c.profile_steps = 5
  return c


def _mesh():
  """How the devices are laid out."""
  c = ml_collections.ConfigDict()
  # Devices along each axis; -1 takes all that are left.
  c.data = -1
  # Shards parameters, optimizer state and EMA as well as the batch.
  c.fsdp = 1
  # Splits attention and feed-forward layers: for where one pair a device is
  # still too much. Slower than fsdp.
  c.tensor = 1
  # Slices of a multi-slice TPU (or hosts joined by a slow network) that data
  # is spread over; a divisor of data. fsdp and tensor stay within a slice.
  c.dcn_data = 1
  return c


def _eval():
  """Measuring and sampling."""
  c = ml_collections.ConfigDict()
  # Held-out captions to draw from at the end, and images for each.
  c.num_prompts = 200
  c.images_per_prompt = 1
  # ddim | ddpm | euler | euler_ancestral | dpmpp_2m, its steps, and
  # uncond + scale * (cond - uncond), 1.0 or less is off; the rescale (0 off)
  # tames the contrast of high scales.
  c.sampler = 'ddim'
  c.num_steps = 50
  c.guidance_scale = 7.5
  c.guidance_rescale = 0.0
  # Images (or pairs) at once.
  c.batch_size = 16
  # Held-out pairs to measure on, by the hash of their captions; 0 is all.
  c.num_pairs = 1024
  # Draws of noise and timestep a held-out pair, for the implicit accuracy.
  c.num_draws = 8
  # Folder of a style judge (task classify) and the class that should win.
  c.judge = ''
  c.preferred = ''
  # Nearest picture among all real ones: only for small data sets.
  c.retrieval = False
  # NAME=FOLDER of a judge, as for dpo_jax.tools.label: every train.eval_every
  # steps the policy draws score_prompts, always from the same noise, and the
  # checkpoint of the largest median score is kept (Wallace et al., section 5.1:
  # PickScore on 500 validation prompts). '' is off.
  c.scorer = ''
  # Folder with CLIP's vocab.json and merges.txt, where the judge has none.
  c.scorer_tokenizer = ''
  # File of prompts (.txt, .json, .jsonl, .csv, .tsv, .parquet), '' for the
  # held-out captions; the first so many of them.
  c.score_prompts = ''
  c.num_score_prompts = 500
  return c


def _export():
  """What a run leaves."""
  c = ml_collections.ConfigDict()
  # float32 | float16 | bfloat16.
  c.dtype = 'float32'
  # Which step: last | best (by eval.scorer) | auto (best where there is a
  # scorer, else last).
  c.select = 'auto'
  return c
