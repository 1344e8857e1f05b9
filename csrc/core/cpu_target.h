// The choice of instruction set, made once at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastopt {

// Names of the targets that this machine runs, best first.
std::vector<std::string> cpu_targets();

// The kernels in use: the best that this machine runs, until `use_cpu_target` says otherwise.
const Kernels& kernels();

// Throws std::invalid_argument, with the names there are, for one that this machine does not run.
void use_cpu_target(const std::string& name);

}  // namespace fastopt
