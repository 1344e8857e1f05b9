// Copy jobs, and running many of them over all threads.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "file.h"
#include "kernels.h"

namespace fastopt {

inline constexpr int kNoFile = -1;

// Casts `count` elements at `src` into `dst`. `dst` overlaps no other memory of the batch.
struct Job {
  const void* src;
  void* dst;
  int64_t count;
  DType src_dtype;
  DType dst_dtype;
  Audit* audit = nullptr;  // where the cast is counted, if it is to be; several jobs may share one
  bool is_given = false;   // whether the memory at `src` may be lost; a large batch discards it as it has been read
  // An open file that holds what is at `src`, from `file_offset` on: it is read, and `src` is not touched.
  int file = kNoFile;
  int64_t file_offset = 0;
};

// Calls `task(i)` for every i in [0, tasks), on as many threads as it sees fit, and returns when all are done.
using Parallel = std::function<void(int64_t tasks, const std::function<void(int64_t)>& task)>;

// Runs all jobs on at most `threads` threads. Throws std::bad_alloc before any byte is written, and ReadError, the
// first of them, when all threads have stopped.
void run(std::span<const Job> jobs, const Kernels& kernels, int64_t threads, const Parallel& parallel);

}  // namespace fastopt
