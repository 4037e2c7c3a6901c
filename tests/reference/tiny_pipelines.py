"""Pipelines of diffusers small enough to build on the spot, and an exact model dressed as a U-Net."""

from __future__ import annotations

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


class GaussianUNet(diffusers.ModelMixin, diffusers.ConfigMixin):
    """The exact noise of data N(mean, std^2) under a table of betas, for whole and fractional timesteps."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=2, mean=0.3, std=0.5, beta_start=1e-4, beta_end=0.02, table=1000):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(1))  # pipelines ask for a dtype and a device
        betas = torch.linspace(beta_start, beta_end, table, dtype=torch.float32).double()
        shares = (1 - betas).cumprod(0)
        self.ratios = ((1 - shares) / shares).sqrt().log()
        self.calls = 0
        self.seen = []

    def ratio(self, timestep):
        t = torch.as_tensor(timestep).double().cpu()
        low = t.floor().long().clamp(0, len(self.ratios) - 2)
        return (self.ratios[low] + (t - low) * (self.ratios[low + 1] - self.ratios[low])).exp()

    def noise(self, x, timestep):
        s = self.ratio(timestep).to(x.device)
        s = s.reshape(-1, 1, 1, 1) if s.dim() else s
        alpha, sigma = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
        return sigma * (x - alpha * self.config.mean) / (alpha**2 * self.config.std**2 + sigma**2)

    def forward(self, sample, timestep, return_dict=True, **_):
        self.calls += 1
        self.seen.append((sample.clone(), torch.as_tensor(timestep).clone()))
        out = self.noise(sample.double(), timestep).to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def unet(channels=3, size=16, **options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def autoencoder(channels=4):
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def dit(scheduler, size=8):
    torch.manual_seed(2)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    with torch.no_grad():  # its output layers start at zero
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return diffusers.DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=scheduler)


def stable_diffusion(scheduler, folder, kind=diffusers.StableDiffusionPipeline):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(3)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    letters = [chr(code) for code in range(97, 123)]
    words = {
        token: place
        for place, token in enumerate(
            [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        )
    }
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=12)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=words["<|startoftext|>"],
            eos_token_id=words["<|endoftext|>"],
            pad_token_id=words["<|endoftext|>"],
        )
    ).eval()
    pipe = kind(
        vae=autoencoder(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe


def counted(model):
    """Rows of every call of a network, in order."""
    rows = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len((args or tuple(kwargs.values()))[0])), with_kwargs=True
    )
    return rows
