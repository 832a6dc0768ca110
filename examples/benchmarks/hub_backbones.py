"""Every backbone of keras_hub in a size of seconds: some layers, few channels, small images.

SAM3 is left out: in keras_hub 0.32 its own call fails on TensorFlow, before anything is pruned. The
sizes are of the order of those in keras_hub's own tests. Widths are large enough that channels,
heads and groups of heads can be told apart.
"""

import importlib

import keras
import keras_hub
import numpy as np

HUB = keras_hub.models
_TEXT = {"vocabulary_size": 20, "num_layers": 2, "intermediate_dim": 24}
_HEADS = {**_TEXT, "num_heads": 2, "hidden_dim": 16}
_LIMITED = {**_HEADS, "max_sequence_length": 8}
_GROUPED = {**_TEXT, "hidden_dim": 16, "num_query_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "top_k": 2}
_QWEN = {
    **{**_GROUPED, "head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
}
_T5GEMMA = {
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "hidden_dim": 32,
            "intermediate_dim": 24,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }.items()
    },
    "vocabulary_size": 20,
    "dropout_rate": 0.1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 1.0,
    "attention_bias": False,
    "hidden_activation": "gelu_approximate",
    "sliding_window": 16,
    "cross_attention_hidden_size": 32,
    "attn_logit_softcapping": 50.0,
    "rope_max_wavelength": 10000.0,
    "initializer_range": 0.04,
    "attention_dropout": 0.1,
}
_GEMMA = {
    **{**_TEXT, "hidden_dim": 16, "head_dim": 4},
    "num_query_heads": 4,
    "num_key_value_heads": 2,
}
_MIT = {
    "layerwise_depths": [2, 2],
    "image_shape": (32, 32, 3),
    "hidden_dims": [8, 16],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [8, 4],
    "max_drop_path_rate": 0.1,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
}
_VIT = {"image_shape": (28, 28, 3), "num_layers": 2, "hidden_dim": 24, "num_heads": 3}
_DINO = {
    **{"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "intermediate_dim": 32},
    **{"layer_scale_init_value": 1.0, "num_register_tokens": 2},
}


def _inner(path):
    """A class that keras_hub does not export."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"keras_hub.src.models.{module}"), name)


def _resnet(filters=(64, 64, 64), block="basic_block", **kwargs):
    return HUB.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=list(filters),
        stackwise_num_blocks=[2] * len(filters),
        stackwise_num_strides=[1, *[2] * (len(filters) - 1)],
        block_type=block,
        **kwargs,
    )


def _encoders(family, size=32):
    vision = getattr(HUB, f"{family}VisionEncoder")(
        8, 16, 2, 2, 24, image_shape=(size, size, 3), name="vision_encoder"
    )
    text = getattr(HUB, f"{family}TextEncoder")(
        20, 16, 16, 2, 2, 24, max_sequence_length=8, name="text_encoder"
    )
    return {"vision_encoder": vision, "text_encoder": text}


def _blip2():
    vision = HUB.BLIP2VisionEncoder(
        **{"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16},
        **{"intermediate_dim": 24, "use_patch_bias": True, "use_class_token": True},
        **{"use_mha_bias": True, "use_mlp_bias": True, "dropout_rate": 0.0},
        **{"layer_norm_epsilon": 1e-6, "initializer_range": 0.02, "dtype": "float32"},
    )
    qformer = HUB.BLIP2QFormer(
        **{"num_query_tokens": 2, "num_layers": 2, "num_heads": 2, "hidden_dim": 16},
        **{"intermediate_dim": 24, "vision_dim": 16, "cross_attention_frequency": 1},
        **{"dropout": 0.0, "layer_norm_epsilon": 1e-6, "dtype": "float32"},
    )
    language = HUB.BLIP2CustomOPT(
        **_HEADS,
        **{"num_query_tokens": 2, "qformer_hidden_dim": 16, "max_sequence_length": 10},
        **{"dropout": 0.0, "language_projection": None, "dtype": "float32"},
    )
    return HUB.BLIP2Backbone(vision_encoder=vision, qformer=qformer, language_model=language)


def _hgnet(**kwargs):
    return HUB.HGNetV2Backbone(
        stem_channels=[3, 8, 16],
        stackwise_stage_filters=[[16, 8, 32, 1, 1, 3], [32, 16, 64, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        depths=[1, 1],
        hidden_sizes=[32, 64],
        embedding_size=16,
        hidden_act="relu",
        **kwargs,
    )


def _dfine():
    backbone = _hgnet(
        use_learnable_affine_block=True,
        image_shape=(None, None, 3),
        out_features=["stage1", "stage2"],
    )
    return HUB.DFineBackbone(
        backbone=backbone,
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=10,
        num_labels=4,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=10,
        anchor_image_size=(32, 32),
        feat_strides=[4, 8],
        num_feature_levels=2,
        encoder_in_channels=[32, 64],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=32,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=3,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=16,
        num_lqe_layers=2,
        out_features=["stage1", "stage2"],
        image_shape=(None, None, 3),
        seed=0,
    )


def _depth_anything():
    encoder = HUB.DINOV2Backbone(
        14, 4, 16, 2, 32, 1.0, 0, image_shape=(126, 126, 3), apply_layernorm=True, name="encoder"
    )
    return HUB.DepthAnythingBackbone(
        image_encoder=encoder,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[16, 16, 32, 32],
        fusion_hidden_dim=32,
        head_hidden_dim=16,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )


def _efficientnet():
    return HUB.EfficientNetBackbone(
        stackwise_kernel_sizes=[3, 3, 3],
        stackwise_num_repeats=[1, 2, 2],
        stackwise_input_filters=[16, 16, 24],
        stackwise_output_filters=[16, 24, 32],
        stackwise_expansion_ratios=[1, 4, 4],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.0, 0.25],
        stackwise_strides=[1, 2, 2],
        stackwise_block_types=["fused", "fused", "unfused"],
        stackwise_force_input_filters=[0] * 3,
        stackwise_nores_option=[False] * 3,
        width_coefficient=1.0,
        depth_coefficient=1.0,
    )


def _flux():
    return HUB.FluxBackbone(
        input_channels=16,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=4,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 4, 8],
        theta=10000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(16, 16),
        text_shape=(16, 16),
        image_ids_shape=(16, 3),
        text_ids_shape=(16, 3),
        y_shape=(16,),
    )


def _gemma3():
    return HUB.Gemma3Backbone(
        **_GEMMA,
        image_size=16,
        query_head_dim_normalize=True,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=8,
        vision_encoder=None,
    )


def _gemma3n():
    return HUB.Gemma3nBackbone(
        text_vocab_size=20,
        text_hidden_size=16,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=[24, 24],
        hidden_activation="gelu_approximate",
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=4,
        rope_theta=10000.0,
        max_position_embeddings=8,
        vocab_size_per_layer_input=20,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=2,
    )


def _gemma4():
    return HUB.Gemma4Backbone(
        **_GEMMA, image_size=16, use_sliding_window_attention=True, sliding_window_size=8
    )


def _mobilenet():
    return HUB.MobileNetBackbone(
        stackwise_expansion=[[24, 32], [32, 48]],
        stackwise_num_blocks=[2, 2],
        stackwise_num_filters=[[16, 16], [24, 24]],
        stackwise_kernel_size=[[3, 3], [5, 5]],
        stackwise_num_strides=[[2, 1], [2, 1]],
        stackwise_se_ratio=[[None, None], [0.25, 0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish", "hard_swish"], ["hard_swish"]],
        stackwise_padding=[[1, 1], [2, 2]],
        output_num_filters=64,
        input_activation="hard_swish",
        output_activation="hard_swish",
        input_num_filters=16,
        image_shape=(32, 32, 3),
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        squeeze_and_excite=0.5,
        last_layer_filter=48,
    )


def _mobilenet5():
    return HUB.MobileNetV5Backbone(
        stackwise_block_types=[["er"], ["uir", "uir"]],
        stackwise_num_blocks=[1, 2],
        stackwise_num_filters=[[16], [24, 24]],
        stackwise_strides=[[2], [2, 1]],
        stackwise_act_layers=[["relu"], ["relu", "relu"]],
        stackwise_exp_ratios=[[2.0], [2.0, 2.0]],
        stackwise_se_ratios=[[0.0], [0.0, 0.0]],
        stackwise_dw_kernel_sizes=[[0], [5, 5]],
        stackwise_dw_start_kernel_sizes=[[0], [0, 0]],
        stackwise_dw_end_kernel_sizes=[[0], [0, 0]],
        stackwise_exp_kernel_sizes=[[3], [0, 0]],
        stackwise_pw_kernel_sizes=[[1], [0, 0]],
        stackwise_num_heads=[[0], [0, 0]],
        stackwise_key_dims=[[0], [0, 0]],
        stackwise_value_dims=[[0], [0, 0]],
        stackwise_kv_strides=[[0], [0, 0]],
        stackwise_use_cpe=[[False], [False, False]],
        image_shape=(32, 32, 3),
        stem_size=16,
        use_msfa=False,
    )


def _parseq():
    encoder = HUB.ViTBackbone(
        **{**_VIT, "image_shape": (16, 32, 3), "patch_size": (4, 8), "mlp_dim": 32},
        use_class_token=False,
        name="image_encoder",
    )
    return HUB.PARSeqBackbone(
        image_encoder=encoder,
        vocabulary_size=20,
        max_label_length=8,
        decoder_hidden_dim=24,
        num_decoder_layers=1,
        num_decoder_heads=3,
        decoder_mlp_dim=32,
    )


def _sam():
    encoder = _vitdet(num_output_channels=8)
    return HUB.SAMBackbone(
        image_encoder=encoder,
        prompt_encoder=_inner("sam.sam_prompt_encoder.SAMPromptEncoder")(
            hidden_size=8,
            image_embedding_size=(8, 8),
            input_image_size=(16, 16),
            mask_in_channels=16,
        ),
        mask_decoder=_inner("sam.sam_mask_decoder.SAMMaskDecoder")(
            num_layers=2,
            hidden_size=16,
            intermediate_dim=32,
            num_heads=8,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=8,
        ),
    )


def _vitdet(num_output_channels=8):
    return HUB.ViTDetBackbone(
        image_shape=(16, 16, 3),
        patch_size=2,
        hidden_size=16,
        num_layers=2,
        global_attention_layer_indices=[1],
        intermediate_dim=24,
        num_heads=2,
        num_output_channels=num_output_channels,
        window_size=2,
    )


def _stable_diffusion():
    vae = _inner("vae.vae_backbone.VAEBackbone")(
        [32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode", name="vae"
    )
    clip = {
        name: HUB.CLIPTextEncoder(20, width, width, 2, 2, 64, act, -2, name=name)
        for name, width, act in (("clip_l", 32, "quick_gelu"), ("clip_g", 64, "gelu"))
    }
    return HUB.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=32,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=192,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=vae,
        **clip,
        image_shape=(32, 32, 3),
    )


def _moonshine():
    return HUB.MoonshineBackbone(
        vocabulary_size=20,
        filter_dim=16,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=16,
        intermediate_dim=24,
        encoder_num_heads=2,
        decoder_num_heads=2,
        feedforward_expansion_factor=2,
        encoder_use_swiglu_activation=False,
        decoder_use_swiglu_activation=True,
        max_position_embeddings=64,
        partial_rotary_factor=0.62,
    )


BACKBONES = {
    "Albert": lambda: HUB.AlbertBackbone(**_LIMITED, num_groups=1, embedding_dim=12),
    "Bart": lambda: HUB.BartBackbone(**_LIMITED),
    "BASNet": lambda: HUB.BASNetBackbone(
        image_encoder=_resnet((64, 64, 64, 64)), num_classes=1, image_shape=(64, 64, 3)
    ),
    "Bert": lambda: HUB.BertBackbone(**_LIMITED),
    "BLIP2": _blip2,
    "Bloom": lambda: HUB.BloomBackbone(**_HEADS),
    "CLIP": lambda: HUB.CLIPBackbone(**_encoders("CLIP"), projection_dim=16),
    "CSPNet": lambda: HUB.CSPNetBackbone(
        **{"stem_filters": 16, "stem_kernel_size": 3, "stem_strides": 1, "stackwise_strides": 2},
        **{"stackwise_depth": [1, 2, 2], "stackwise_num_filters": [16, 24, 32]},
        **{"image_shape": (32, 32, 3), "down_growth": True, "bottle_ratio": (0.5, 1.0)},
        **{"block_ratio": (1.0, 0.5), "expand_ratio": (2.0, 1.0), "block_type": "dark_block"},
        **{"stage_type": "csp", "stem_padding": "same"},
    ),
    "DebertaV3": lambda: HUB.DebertaV3Backbone(**_LIMITED),
    "DeepLabV3": lambda: HUB.DeepLabV3Backbone(
        image_encoder=_resnet(),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        dilation_rates=[2, 3],
        upsampling_size=4,
        image_shape=(64, 64, 3),
    ),
    "DeiT": lambda: HUB.DeiTBackbone(**_VIT, patch_size=4, intermediate_dim=32),
    "DenseNet": lambda: HUB.DenseNetBackbone(
        stackwise_num_repeats=[2, 3, 2],
        compression_ratio=0.5,
        growth_rate=4,
        image_shape=(32, 32, 3),
    ),
    "DepthAnything": _depth_anything,
    "DFine": _dfine,
    "DINOV2": lambda: HUB.DINOV2Backbone(
        **_DINO, patch_size=14, image_shape=(28, 28, 3), use_swiglu_ffn=True
    ),
    "DINOV3": lambda: HUB.DINOV3Backbone(
        **_DINO, patch_size=16, image_shape=(32, 32, 3), use_gated_mlp=False
    ),
    "DistilBert": lambda: HUB.DistilBertBackbone(**_LIMITED),
    "EdRec": lambda: HUB.EdRecBackbone(
        **{"vocab_size": 20, "num_layers_enc": 2, "num_layers_dec": 2, "num_heads": 2},
        **{"hidden_dim": 16, "intermediate_dim": 24},
    ),
    "EfficientNet": _efficientnet,
    "Electra": lambda: HUB.ElectraBackbone(
        **{"vocab_size": 20, "num_layers": 2, "num_heads": 2, "hidden_dim": 16},
        **{"embedding_dim": 12, "intermediate_dim": 24, "max_sequence_length": 8},
    ),
    "ESM2": lambda: HUB.ESM2Backbone(**_HEADS),
    "Falcon": lambda: HUB.FalconBackbone(
        **{**_TEXT, "hidden_dim": 16, "num_attention_heads": 4}, attention_dropout_rate=0
    ),
    "Flux": _flux,
    "FNet": lambda: HUB.FNetBackbone(**{k: v for k, v in _LIMITED.items() if k != "num_heads"}),
    "Gemma": lambda: HUB.GemmaBackbone(**_GEMMA),
    "Gemma3": _gemma3,
    "Gemma3n": _gemma3n,
    "Gemma4": _gemma4,
    "GPT2": lambda: HUB.GPT2Backbone(**_LIMITED),
    "GPTNeoX": lambda: HUB.GPTNeoXBackbone(**_LIMITED),
    "GptOss": lambda: HUB.GptOssBackbone(**_GROUPED, **_EXPERTS, sliding_window=4),
    "HGNetV2": lambda: _hgnet(
        use_learnable_affine_block=False,
        image_shape=(32, 32, 3),
        out_features=["stem", "stage1", "stage2"],
    ),
    "Llama": lambda: HUB.LlamaBackbone(**_GROUPED),
    "Llama3": lambda: HUB.Llama3Backbone(**_GROUPED),
    "MetaCLIP2": lambda: HUB.MetaCLIP2Backbone(**_encoders("MetaCLIP2"), projection_dim=16),
    "Mistral": lambda: HUB.MistralBackbone(**_GROUPED, sliding_window=4),
    "MiT": lambda: HUB.MiTBackbone(**_MIT),
    "Mixtral": lambda: HUB.MixtralBackbone(**_GROUPED, **_EXPERTS, sliding_window=4),
    "MobileNet": _mobilenet,
    "MobileNetV5": _mobilenet5,
    "Moonshine": _moonshine,
    "OPT": lambda: HUB.OPTBackbone(**_LIMITED),
    "PaliGemma": lambda: HUB.PaliGemmaBackbone(
        **_GEMMA,
        **{"image_size": 16, "vit_patch_size": 4, "vit_num_layers": 2, "vit_num_heads": 2},
        **{"vit_hidden_dim": 16, "vit_intermediate_dim": 24},
    ),
    "PARSeq": _parseq,
    "Phi3": lambda: HUB.Phi3Backbone(**_GROUPED),
    "Qwen2": lambda: HUB.Qwen2Backbone(**_GROUPED),
    "Qwen3": lambda: HUB.Qwen3Backbone(**_GROUPED, head_dim=4),
    "Qwen3Moe": lambda: HUB.Qwen3MoeBackbone(
        **_GROUPED, **_EXPERTS, head_dim=4, moe_intermediate_dim=12
    ),
    "Qwen3_5": lambda: HUB.Qwen3_5Backbone(**_QWEN),
    "Qwen3_5Moe": lambda: HUB.Qwen3_5MoeBackbone(
        **{k: v for k, v in _QWEN.items() if k != "intermediate_dim"},
        **{**_EXPERTS, "moe_intermediate_dim": 12, "shared_expert_intermediate_size": 12},
    ),
    "QwenMoe": lambda: HUB.QwenMoeBackbone(
        **_GROUPED, **_EXPERTS, moe_intermediate_dim=12, shared_expert_intermediate_dim=20
    ),
    "ResNet": lambda: _resnet(block="bottleneck_block", image_shape=(32, 32, 3)),
    "RetinaNet": lambda: HUB.RetinaNetBackbone(
        image_encoder=_resnet((64, 64, 64, 64), "bottleneck_block"),
        min_level=3,
        max_level=7,
        use_p5=True,
        image_shape=(128, 128, 3),
    ),
    "Roberta": lambda: HUB.RobertaBackbone(**_LIMITED),
    "RoformerV2": lambda: HUB.RoformerV2Backbone(**_HEADS, head_size=8),
    "RWKV7": lambda: HUB.RWKV7Backbone(
        **{"vocabulary_size": 20, "hidden_size": 16, "num_layers": 2, "head_size": 4},
        **{"intermediate_dim": 24, "gate_lora": 8, "mv_lora": 8, "aaa_lora": 8, "decay_lora": 8},
    ),
    "SAM": _sam,
    "SegFormer": lambda: HUB.SegFormerBackbone(
        projection_filters=16, image_encoder=HUB.MiTBackbone(**_MIT)
    ),
    "SigLIP": lambda: HUB.SigLIPBackbone(**_encoders("SigLIP")),
    "SmolLM3": lambda: HUB.SmolLM3Backbone(
        **{**_TEXT, "hidden_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
        **{"rope_layer_enabled_list": [True, False], "layer_types": ["attention"] * 2},
        **{"layer_norm_epsilon": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0},
        **{"partial_rotary_factor": 1.0},
    ),
    "StableDiffusion3": _stable_diffusion,
    "SwinTransformer": lambda: HUB.SwinTransformerBackbone(
        image_shape=(32, 32, 3), embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
    "T5": lambda: HUB.T5Backbone(**_HEADS),
    "T5Gemma": lambda: HUB.T5GemmaBackbone(**_T5GEMMA),
    "T5Gemma2": lambda: HUB.T5Gemma2Backbone(**_T5GEMMA, use_query_key_norm=True),
    "VGG": lambda: HUB.VGGBackbone(
        stackwise_num_repeats=[2, 3], stackwise_num_filters=[8, 16], image_shape=(16, 16, 3)
    ),
    "VideoPrism": lambda: HUB.VideoPrismBackbone(
        **{"image_shape": (16, 16, 3), "num_frames": 2, "patch_size": 4, "hidden_dim": 16},
        **{"intermediate_dim": 24, "num_heads": 2, "num_spatial_layers": 1},
        **{"num_temporal_layers": 1, "num_auxiliary_layers": 1, "vocabulary_size": 20},
        **{"num_text_layers": 1, "attention_logit_soft_cap": 50.0},
    ),
    "ViT": lambda: HUB.ViTBackbone(**_VIT, patch_size=(4, 4), mlp_dim=32),
    "ViTDet": _vitdet,
    "Whisper": lambda: HUB.WhisperBackbone(
        **_HEADS, max_encoder_sequence_length=8, max_decoder_sequence_length=8
    ),
    "XLMRoberta": lambda: HUB.XLMRobertaBackbone(**_LIMITED),
    "XLNet": lambda: HUB.XLNetBackbone(**_HEADS),
    "Xception": lambda: HUB.XceptionBackbone(
        stackwise_conv_filters=[[8, 16], [24, 24], [32, 32]],
        stackwise_pooling=[False, True, False],
        image_shape=(64, 64, 3),
    ),
}

_TOKENS, _LENGTH, _IMAGE = 20, 8, 32
_SIZES = {"encoder_input_values": (1000, 1), "masks": (0, 16, 16, 1)}


def example(model, batch_size=2, seed=0):
    """Random inputs of a backbone: token numbers, masks with a padded end, images.

    Args:
        model: The backbone.
        batch_size: Number of examples.
        seed: Of the random numbers.

    Returns:
        Arrays in the structure of the model's inputs.
    """
    rng = np.random.default_rng(seed)

    def draw(tensor):
        name, shape = tensor.name, list(tensor.shape[1:])
        stand_in = _IMAGE if len(shape) > 2 else _LENGTH
        shape = [stand_in if size is None else size for size in shape]
        if name in _SIZES and None in tensor.shape[1:]:
            shape = [
                size if known is None else known
                for size, known in zip(_SIZES[name], tensor.shape[1:], strict=True)
            ]
        shape = (batch_size, *shape)
        if "mask" in name and ("int" in tensor.dtype or tensor.dtype == "bool"):
            array = np.ones(shape)
            array[-1, ..., -1:] = 0
        elif name == "num_steps":
            array = np.full(shape, 3)
        elif "token_ids" in name:
            array = rng.integers(1, _TOKENS, shape)
        elif "int" in tensor.dtype or tensor.dtype == "bool":
            array = rng.integers(0, 2, shape)
        else:
            array = rng.normal(size=shape)
        return array.astype(tensor.dtype)

    return keras.tree.map_structure(draw, model.input)
