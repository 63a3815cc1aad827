// Runs a callable over pieces of [0, count) on an Executor.
#pragma once
#include <cstdint>

#include "grinqh/core.h"

namespace grinqh {

template <typename Body>
void parallel_for(const Executor& executor, std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (executor.run == nullptr || count <= grain) {
    body(std::int64_t{0}, count);
    return;
  }
  const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  executor.run(count, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace grinqh
