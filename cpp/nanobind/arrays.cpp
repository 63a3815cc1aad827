#include "arrays.h"

#include <memory>
#include <string>
#include <vector>

namespace grinqh::python {
namespace {

using nb::dlpack::dtype;
using nb::dlpack::dtype_code;

dtype dlpack_dtype(Element element) {
  switch (element) {
    case Element::u8: return nb::dtype<std::uint8_t>();
    case Element::i32: return nb::dtype<std::int32_t>();
    case Element::f16: return {static_cast<std::uint8_t>(dtype_code::Float), 16, 1};
    case Element::f32: break;
  }
  return nb::dtype<float>();
}

std::string dtype_name(dtype type) {
  const std::string bits = std::to_string(type.bits);
  switch (static_cast<dtype_code>(type.code)) {
    case dtype_code::Int: return "int" + bits;
    case dtype_code::UInt: return "uint" + bits;
    case dtype_code::Float: return "float" + bits;
    case dtype_code::Bfloat: return "bfloat" + bits;
    case dtype_code::Complex: return "complex" + bits;
    case dtype_code::Bool: return "bool";
    default: return "of DLPack code " + std::to_string(type.code) + " with " + bits + " bits";
  }
}

template <typename Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string text;
  for (const std::int64_t size : sizes) {
    text += (text.empty() ? "[" : ", ") + (size == kAnySize ? std::string("any") : std::to_string(size));
  }
  return text.empty() ? "[]" : text + "]";
}

std::string shape_name(const Input& array) {
  return shape_name(std::vector<std::int64_t>(array.shape_ptr(), array.shape_ptr() + array.ndim()));
}

[[noreturn]] void refuse(const char* name, const std::string& what) { throw nb::value_error((name + what).c_str()); }

bool has_shape(const Input& array, std::initializer_list<std::int64_t> shape) {
  if (array.ndim() != shape.size()) return false;
  std::size_t axis = 0;
  for (const std::int64_t size : shape) {
    if (size != kAnySize && static_cast<std::int64_t>(array.shape(axis)) != size) return false;
    ++axis;
  }
  return true;
}

bool is_contiguous(const Input& array) {
  if (array.size() == 0) return true;
  std::int64_t stride = 1;
  for (std::size_t axis = array.ndim(); axis-- > 0;) {
    const auto size = static_cast<std::int64_t>(array.shape(axis));
    if (size != 1 && array.stride(axis) != stride) return false;
    stride *= size;
  }
  return true;
}

template <typename T>
Output allocate(std::size_t size, std::size_t ndim, const std::size_t* shape, dtype type) {
  auto data = std::make_unique_for_overwrite<T[]>(size);
  nb::capsule owner(data.get(), [](void* pointer) noexcept { delete[] static_cast<T*>(pointer); });
  return Output(data.release(), ndim, shape, owner, nullptr, type, nb::device::cpu::value);
}

}  // namespace

const void* checked_data(const Input& array, const char* name, Element element,
                         std::initializer_list<std::int64_t> shape) {
  if (array.device_type() != nb::device::cpu::value)
    refuse(name, " is not on the CPU: allowed are arrays in its memory");
  if (const dtype wanted = dlpack_dtype(element); array.dtype() != wanted) {
    refuse(name, " has dtype " + dtype_name(array.dtype()) + ": allowed is " + dtype_name(wanted));
  }
  if (!has_shape(array, shape)) refuse(name, " has shape " + shape_name(array) + ": allowed is " + shape_name(shape));
  if (!is_contiguous(array)) refuse(name, " is strided: allowed are C-contiguous arrays");
  return array.data();
}

std::int64_t checked_size(const Input& array, const char* name, std::size_t ndim, std::size_t axis) {
  if (array.ndim() != ndim) {
    refuse(name, " has shape " + shape_name(array) + ": allowed are " + std::to_string(ndim) + " dimensions");
  }
  return static_cast<std::int64_t>(array.shape(axis));
}

Element activation_element(const Input& array, const char* name) {
  for (const Element element : {Element::f32, Element::f16}) {
    if (array.dtype() == dlpack_dtype(element)) return element;
  }
  refuse(name, " has dtype " + dtype_name(array.dtype()) + ": allowed are float32 and float16");
}

Dtype core_dtype(Element element) { return element == Element::f16 ? Dtype::f16 : Dtype::f32; }

Output new_array(Element element, std::initializer_list<std::int64_t> shape) {
  const std::vector<std::size_t> sizes(shape.begin(), shape.end());
  std::size_t size = 1;
  for (const std::size_t extent : sizes) size *= extent;
  const dtype type = dlpack_dtype(element);
  switch (element) {
    case Element::u8: return allocate<std::uint8_t>(size, sizes.size(), sizes.data(), type);
    case Element::f16: return allocate<std::uint16_t>(size, sizes.size(), sizes.data(), type);
    case Element::i32: return allocate<std::int32_t>(size, sizes.size(), sizes.data(), type);
    case Element::f32: break;
  }
  return allocate<float>(size, sizes.size(), sizes.data(), type);
}

}  // namespace grinqh::python
