#include "run.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <mutex>
#include <vector>

#include "huge_pages.h"

namespace fastopt {
namespace {

// Note [Cutting]
// All jobs of a batch are laid end to end on one line, each as long as it is expected to take: the bytes it reads and
// writes, plus a fixed cost. The line is cut into chunks of equal length, wherever that falls, so that one huge tensor
// and a million small ones both fill every thread. Threads take the next chunk when they are done with one.
constexpr int64_t kJobCost = 128;          // what a call costs, in bytes that could have moved meanwhile
constexpr int64_t kChunkCost = 1 << 20;    // small against a thread's share, large against the cost of taking a chunk
constexpr int64_t kSerialCost = 64 << 10;  // less than this is done before a second thread would have woken
constexpr int64_t kCutElements = 64;       // cuts fall on multiples of this: whole vectors and, mostly, cache lines

// Note [Streaming]
// A store that misses the cache first reads the line that it will overwrite; one that streams past the cache does not.
// That pays where the output would be gone from the cache before somebody reads it, and costs where it would not.
// Measured with 32 MiB of last-level cache and two threads, in GB/s read and written, cached against streaming, medians
// on a machine that others used as well. Batches of bytes that write 4 MiB: 38 against 33, 16 MiB: 26 against 37,
// 256 MiB: 18 against 27. From float32 to bfloat16: 37 against 37, 23 against 27, 23 against 27, and at 64 MiB, against
// the trend, 27 against 24. Bytes in jobs of 256: 28 against 8, of 1 KiB: 29 against 24, of 4 KiB: 32 against 39. Into
// fresh pages, by a loop of the same stores from float32 to bfloat16: 17 against 18. What comes out of a file is not
// streamed: the copy out of the page cache sets the pace, and streaming took 1.12 to 1.15 times as long as reading the
// file and touching the results alone, the cache 1.04 to 1.06 times (2 MiB of second-level cache, fresh memory).
constexpr int64_t kStreamedBatch = 16 << 20;  // bytes written
constexpr int64_t kStreamedJob = 4 << 10;

// A batch that reads less than this needs not give back what it has read before it ends; a large one, but for jobs that
// are less than some pages.
constexpr int64_t kDiscardedBatch = 48 << 20;
constexpr int64_t kDiscardedJob = 64 << 10;

// Note [Reading files]
// What lies in a file is read by the threads that cast it, through a buffer that stays in the cache; bytes go straight
// to their place. Through a mapping of the file every 64 KiB would be a page fault, and a file that has been cut short
// kills the process, where a read is an error.
constexpr int64_t kReadBuffer = 256 << 10;

class Line {
 public:
  explicit Line(std::span<const Job> jobs) : jobs_(jobs) {
    ends_.reserve(jobs.size());
    int64_t end = 0;
    int64_t read = 0;
    int64_t written = 0;
    for (const Job& job : jobs) {
      end += kJobCost + job.count * bytes_per_element(job);
      ends_.push_back(end);
      read += bytes_read(job);
      written += bytes_written(job);
    }
    streams_ = written >= kStreamedBatch;
    discards_ = read >= kDiscardedBatch;
  }

  int64_t length() const { return ends_.empty() ? 0 : ends_.back(); }

  // Runs what lies in [begin, end) of the line.
  void run(int64_t begin, int64_t end, const Kernels& kernels) {
    auto index = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
    for (; index < jobs_.size() && start_of(index) < end; ++index) {
      const Job& job = jobs_[index];
      const int64_t first = element_at(index, begin);
      const int64_t last = element_at(index, end);
      if (first < last) {
        cast(job, first, last, kernels);
      }
    }
  }

 private:
  void cast(const Job& job, int64_t first, int64_t last, const Kernels& kernels) {
    const char* src = static_cast<const char*>(job.src) + first * size_of(job.src_dtype);
    char* dst = static_cast<char*>(job.dst) + first * size_of(job.dst_dtype);
    if (job.file != kNoFile) {
      cast_from_file(job, job.file_offset + first * size_of(job.src_dtype), dst, last - first, kernels);
      return;
    }
    cast_memory(job, src, dst, last - first, kernels);
    if (job.is_given && discards_ && bytes_read(job) >= kDiscardedJob) {
      discard(const_cast<char*>(src), static_cast<size_t>((last - first) * size_of(job.src_dtype)));
    }
  }

  void cast_memory(const Job& job, const char* src, char* dst, int64_t count, const Kernels& kernels) {
    if (job.audit == nullptr) {
      kernels.find(job.src_dtype, job.dst_dtype, store_of(job))(src, dst, count);
    } else {
      audited_cast(job, src, dst, count, kernels);
    }
  }

  void cast_from_file(const Job& job, int64_t offset, char* dst, int64_t count, const Kernels& kernels) {
    if (job.src_dtype == job.dst_dtype) {
      read_at(job.file, offset, dst, count * size_of(job.src_dtype));
      return;
    }
    alignas(64) thread_local std::array<char, kReadBuffer> buffer;
    const int64_t at_once = kReadBuffer / size_of(job.src_dtype);
    for (int64_t done = 0; done < count; done += at_once) {
      const int64_t part = std::min(at_once, count - done);
      read_at(job.file, offset + done * size_of(job.src_dtype), buffer.data(), part * size_of(job.src_dtype));
      cast_memory(job, buffer.data(), dst + done * size_of(job.dst_dtype), part, kernels);
    }
  }

  void audited_cast(const Job& job, const char* src, char* dst, int64_t count, const Kernels& kernels) {
    Audit audit;
    audit.largest_error = largest_error_so_far(job);  // fewer values are larger than that, and need a closer look
    kernels.find_audited(job.src_dtype, job.dst_dtype, store_of(job))(src, dst, count, audit);
    const std::scoped_lock lock(audits_);
    job.audit->add(audit);
  }

  double largest_error_so_far(const Job& job) {
    const std::scoped_lock lock(audits_);
    return job.audit->largest_error;
  }

  static int64_t bytes_read(const Job& job) { return job.count * size_of(job.src_dtype); }

  static int64_t bytes_written(const Job& job) { return job.count * size_of(job.dst_dtype); }

  static int64_t bytes_per_element(const Job& job) { return size_of(job.src_dtype) + size_of(job.dst_dtype); }

  int64_t start_of(size_t index) const { return index == 0 ? 0 : ends_[index - 1]; }

  // The element of a job that stands at a position of the line. Never falls from one position to a later one, so
  // neighbouring chunks share no element and miss none.
  int64_t element_at(size_t index, int64_t position) const {
    const Job& job = jobs_[index];
    if (position >= ends_[index]) {
      return job.count;
    }
    const int64_t offset = std::max<int64_t>(position - start_of(index) - kJobCost, 0);
    return offset / bytes_per_element(job) / kCutElements * kCutElements;
  }

  Store store_of(const Job& job) const {
    const bool streams = streams_ && job.file == kNoFile && bytes_written(job) >= kStreamedJob;
    return streams ? Store::Streaming : Store::Cached;
  }

  std::span<const Job> jobs_;
  std::vector<int64_t> ends_;
  bool streams_;       // Note [Streaming]
  bool discards_;      // what is given
  std::mutex audits_;  // guards what the jobs' `audit` point to
};

}  // namespace

void run(std::span<const Job> jobs, const Kernels& kernels, int64_t threads, const Parallel& parallel) {
  Line line(jobs);
  const int64_t length = line.length();
  if (threads <= 1 || length <= kSerialCost) {
    line.run(0, length, kernels);
    return;
  }
  const int64_t chunks = std::max(threads, length / kChunkCost);
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failures;
  parallel(std::min(threads, chunks), [&](int64_t) {
    try {
      for (int64_t chunk = next++; chunk < chunks; chunk = next++) {
        // length < 2^63 / chunks in any memory there is, but a product need not rely on that
        const int64_t size = length / chunks;
        const int64_t begin = chunk * size;
        line.run(begin, chunk + 1 == chunks ? length : begin + size, kernels);
      }
    } catch (const ReadError&) {
      next = chunks;  // the others stop as well
      const std::scoped_lock lock(failures);
      failure = failure ? failure : std::current_exception();
    }
  });
  if (failure) {
    std::rethrow_exception(failure);
  }
}

}  // namespace fastopt
