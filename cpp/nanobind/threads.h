// Shares the core's work among plain threads, for a process that has no thread pool of its own.
#pragma once
#include "grinqh/core.h"

namespace grinqh::python {

// At first the number of processors that this process may use.
int num_threads();
void set_num_threads(int count);  // at least 1

// Results do not depend on the number of threads.
Executor thread_executor();

}  // namespace grinqh::python
