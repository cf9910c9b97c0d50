"""Which part of a step a kernel belongs to: names of kernels as PyTorch, cuBLAS, cuDNN, Triton and NCCL have them."""

from __future__ import annotations

import pytest

from megastruct.profiling.parts import ACCUMULATION_RANGE, LOSS_RANGE, OPTIMIZER_RANGE, REDUCTION_RANGE, Part, part_of

FORWARD = ("megastruct::step", "megastruct::forward", "Torch-Compiled Region: 0/0", "## Call CompiledFxGraph fxyz ##")
ACCUMULATE = ("megastruct::backward", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad")
STEP = ("megastruct::step", OPTIMIZER_RANGE, "Optimizer.step#AdamW.step", "aten::_fused_adamw_")

BY_NAME = {
    Part.PRODUCTS: (
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>(T1::Params)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false>",
        "triton_tem_fused__to_copy_addmm_t_3",
        "triton_mm",
        "triton_tem_fused_bmm_7",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "mkldnn::_linear_pointwise",
    ),
    Part.ATTENTION: (
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, cutlass::bfloat16_t>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_bf16_knob_27_64x128x128_1x2x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
        "triton_tem_fused_flex_attention_2",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    Part.ELEMENT_WISE: (
        "triton_poi_fused_gelu_3",
        "triton_poi_fused__scaled_dot_product_flash_attention_transpose_5",
        "triton_red_fused_add_mm_native_layer_norm_backward_9",
        "triton_per_fused_native_layer_norm_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>, std::array<char*, 3ul>>",
        "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "aten::add",
        "aten::native_layer_norm",
        "## Call CompiledFxGraph fxyz ##",
    ),
    Part.LOSS: (
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward_0",
        "triton_red_fused_prepare_softmax_online_1",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "aten::_log_softmax_backward_data",
        "aten::nll_loss_forward",
    ),
    Part.OPTIMIZER: (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
        "void at::native::lpnorm_cleanup<float, float>",
        "aten::_fused_adamw_",
    ),
    Part.COLLECTIVES: (
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)",
        "gloo:all_reduce",
    ),
    Part.STAGE_TRANSFERS: ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "gloo:recv", "gloo:send"),
}
CASES = [(part, name) for part, names in BY_NAME.items() for name in names]
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>>"


@pytest.mark.parametrize("part, name", CASES, ids=[name[:50] for _, name in CASES])
def test_by_name(part: Part, name: str) -> None:
    assert part_of(name) is part and part_of(name, FORWARD) is part


@pytest.mark.parametrize(
    "part, name, ranges",
    [
        (Part.ELEMENT_WISE, ADD, ("megastruct::step", "megastruct::forward", "aten::add")),
        (Part.GRADIENT_ACCUMULATION, ADD, ACCUMULATE),
        (Part.GRADIENT_ACCUMULATION, ADD, (ACCUMULATION_RANGE, "aten::add_")),
        (Part.GRADIENT_ACCUMULATION, "Memcpy DtoD (Device -> Device)", (REDUCTION_RANGE,)),
        (Part.GRADIENT_ACCUMULATION, "multi_tensor_apply_kernel", (ACCUMULATION_RANGE, "aten::_foreach_add_")),
        (Part.OPTIMIZER, ADD, STEP),
        (Part.OPTIMIZER, "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", ("Optimizer.step#Orthogonalized.step",)),
        (Part.LOSS, "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", (LOSS_RANGE, "aten::amax")),
        (Part.LOSS, ADD, ("autograd::engine::evaluate_function: _CrossEntropyBackward", "_CrossEntropyBackward")),
        (Part.PRODUCTS, "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", (LOSS_RANGE, "aten::mm")),
        (Part.ATTENTION, "ampere_sgemm_128x64_tn", ("aten::_scaled_dot_product_attention_math", "aten::bmm")),
        (Part.COLLECTIVES, "ncclDevKernel_AllGather_RING_LL(...)", STEP),
        (Part.COLLECTIVES, "ncclDevKernel_SendRecv(...)", ("nccl:all_to_all", "record_param_comms")),
        (Part.STAGE_TRANSFERS, "ncclDevKernel_SendRecv(...)", ("megastruct::step", "nccl:recv 1<-0")),
    ],
)
def test_ranges_decide_what_a_name_leaves_open(part: Part, name: str, ranges: tuple[str, ...]) -> None:
    assert part_of(name, ranges) is part
