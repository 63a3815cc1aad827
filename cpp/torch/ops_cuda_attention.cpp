// torch.ops.grinqh.decode_attention on CUDA tensors.

#include "attention.h"
#include "counters.h"
#include "cuda_common.h"

namespace grinqh::binding {
namespace {

constexpr const char* kOp = "decode_attention";

// [batch, heads, length, dim] of the query's dtype and device, its last dimension contiguous.
void check_heads(const char* name, const Tensor& tensor, const Tensor& query) {
  STD_TORCH_CHECK(tensor.dim() == 4, "grinqh::", kOp, ": ", name, " has shape ", shape_text(tensor),
                  ": it must be [batch, heads, length, dim]");
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), "grinqh::", kOp, ": ", name, " is ",
                  dtype_name(tensor.scalar_type()), ": it must be ", dtype_name(query.scalar_type()));
  STD_TORCH_CHECK(device_text(tensor) == device_text(query), "grinqh::", kOp, ": ", name, " is on ",
                  device_text(tensor), ": it must be on ", device_text(query));
}

// Whether the numbers of every head can be read 16 bytes at a time.
bool is_aligned(const Tensor& tensor) {
  bool aligned = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && (tensor.stride(d) % 8 == 0 || tensor.size(d) <= 1);
  return aligned;
}

cuda::AttentionParams::Strides cache_strides(const char* name, const Tensor& cache) {
  STD_TORCH_CHECK(is_aligned(cache), "grinqh::", kOp, ": ", name, " has strides ", cache.stride(0), ", ",
                  cache.stride(1), ", ", cache.stride(2), ", ", cache.stride(3),
                  ": the last must be 1, the others multiples of 8, and its address one of 16 bytes");
  return {cache.stride(0), cache.stride(1), cache.stride(2)};
}

void set_mask(const Tensor& mask, const Tensor& query, cuda::AttentionParams& params) {
  const bool fits = mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == params.batch) && mask.size(1) == 1 &&
                    mask.size(2) == 1 && mask.size(3) >= params.length;
  STD_TORCH_CHECK(fits, "grinqh::", kOp, ": mask has shape ", shape_text(mask), ": it must be [", params.batch,
                  " or 1, 1, 1, at least ", params.length, "]");
  params.mask_is_added = mask.scalar_type() != ScalarType::Bool;
  STD_TORCH_CHECK(!params.mask_is_added || mask.scalar_type() == query.scalar_type(), "grinqh::", kOp, ": mask is ",
                  dtype_name(mask.scalar_type()), ": it must be bool or ", dtype_name(query.scalar_type()));
  STD_TORCH_CHECK(device_text(mask) == device_text(query), "grinqh::", kOp, ": mask is on ", device_text(mask),
                  ": it must be on ", device_text(query));
  params.mask = mask.const_data_ptr();
  params.mask_strides = {mask.size(0) == 1 ? 0 : mask.stride(0), 0, mask.stride(3)};
}

Tensor decode_attention_cuda(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, double scale) {
  const DeviceGuard guard(query.get_device_index());
  const cudaStream_t stream = stream_of(query);
  check_heads("query", query, query);
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "grinqh::", kOp, ": query is ",
                  dtype_name(dtype), ": allowed are float16 and bfloat16");
  check_heads("key", key, query);
  check_heads("value", value, query);
  cuda::AttentionParams params{};
  params.dtype = to_dtype(kOp, "query", dtype);
  STD_TORCH_CHECK(cuda::is_attention_dim(query.size(3)), "grinqh::", kOp, ": dim is ", query.size(3),
                  ": allowed are 64, 128 and 256");
  STD_TORCH_CHECK(query.size(2) == 1, "grinqh::", kOp, ": query has ", query.size(2), " positions: it must have 1");
  const bool fits = key.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                    (key.size(1) > 0 ? query.size(1) % key.size(1) == 0 : query.size(1) == 0);
  STD_TORCH_CHECK(fits, "grinqh::", kOp, ": key has shape ", shape_text(key), ": it must be [", query.size(0),
                  ", a divisor of ", query.size(1), ", length, ", query.size(3), "]");
  STD_TORCH_CHECK(shape_text(value) == shape_text(key), "grinqh::", kOp, ": value has shape ", shape_text(value),
                  ": it must be that of key, ", shape_text(key));
  params.dim = static_cast<int>(query.size(3));
  params.batch = query.size(0);
  params.kv_heads = key.size(1);
  params.group = params.kv_heads > 0 ? query.size(1) / params.kv_heads : 0;
  params.length = key.size(2);
  params.key_strides = cache_strides("key", key);
  params.value_strides = cache_strides("value", value);
  if (mask.has_value()) set_mask(*mask, query, params);
  const Tensor rows = is_aligned(query) ? query : torch::stable::contiguous(query);
  params.query_strides = {rows.stride(0), rows.stride(1), 0};
  params.query = rows.const_data_ptr();
  params.key = key.const_data_ptr();
  params.value = value.const_data_ptr();
  params.scale = static_cast<float>(scale);
  Tensor out = torch::stable::new_empty(query, {params.batch, 1, query.size(1), query.size(3)});
  params.out = out.mutable_data_ptr();
  params.splits = cuda::attention_splits(params.length, params.dim);
  cuda::Gpu gpu;
  throw_if_error(kOp, cuda::current_gpu(&gpu, &params.overlap));
  const Tensor partial = torch::stable::new_empty(query, {cuda::attention_partial_count(params)}, ScalarType::Float);
  params.partial = static_cast<float*>(partial.mutable_data_ptr());
  throw_if_error(kOp, cuda::counters_for(stream, cuda::attention_counter_count(params), &params.arrivals));
  throw_if_error(kOp, cuda::attention(params, stream));
  return out;
}

}  // namespace
}  // namespace grinqh::binding

STABLE_TORCH_LIBRARY_IMPL(grinqh, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&grinqh::binding::decode_attention_cuda));
}
