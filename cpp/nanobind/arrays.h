// Arrays from and to Python. An input is checked in full before anything is read; an error names the
// argument, what it is and what is allowed.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>

#include "grinqh/types.h"

namespace grinqh::python {

namespace nb = nanobind;

using Input = nb::ndarray<nb::ro>;
using Output = nb::ndarray<nb::numpy>;

inline constexpr std::int64_t kAnySize = -1;

enum class Element { u8, i32, f16, f32 };

// The data of an array of this element and shape, C-contiguous, on the CPU; else throws a ValueError.
const void* checked_data(const Input& array, const char* name, Element element,
                         std::initializer_list<std::int64_t> shape);

inline const float* floats(const Input& array, const char* name, std::initializer_list<std::int64_t> shape) {
  return static_cast<const float*>(checked_data(array, name, Element::f32, shape));
}
inline const std::uint8_t* bytes(const Input& array, const char* name, std::initializer_list<std::int64_t> shape) {
  return static_cast<const std::uint8_t*>(checked_data(array, name, Element::u8, shape));
}
inline const std::uint16_t* halves(const Input& array, const char* name, std::initializer_list<std::int64_t> shape) {
  return static_cast<const std::uint16_t*>(checked_data(array, name, Element::f16, shape));
}
inline const std::int32_t* ints(const Input& array, const char* name, std::initializer_list<std::int64_t> shape) {
  return static_cast<const std::int32_t*>(checked_data(array, name, Element::i32, shape));
}

// Dimension `axis` of an array that has `ndim` of them; else throws a ValueError.
std::int64_t checked_size(const Input& array, const char* name, std::size_t ndim, std::size_t axis);

// float32 or float16, the activations that NumPy has a dtype for; else throws a ValueError.
Element activation_element(const Input& array, const char* name);
Dtype core_dtype(Element element);

// A new array that NumPy owns; its values are not set.
Output new_array(Element element, std::initializer_list<std::int64_t> shape);

}  // namespace grinqh::python
