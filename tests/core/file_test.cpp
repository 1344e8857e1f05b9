// Jobs whose source is a file.
#include "file.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core_test.h"
#include "cpu_target.h"
#include "dtype.h"
#include "run.h"

namespace core_test {
namespace {

using fastopt::DType;
using fastopt::Job;
using fastopt::ReadError;
using fastopt::size_of;

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::vector<char>& content) : file_(std::tmpfile()) {
    check(file_ != nullptr, "no temporary file");
    check(std::fwrite(content.data(), 1, content.size(), file_.get()) == content.size(), "the file was not written");
    check(std::fflush(file_.get()) == 0, "the file was not written");
  }

  int descriptor() const { return fileno(file_.get()); }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };

  std::unique_ptr<std::FILE, Close> file_;
};

constexpr int64_t kHead = 37;  // bytes of something else, at an odd offset

std::vector<char> numbers(int64_t bytes) {
  std::vector<char> content(static_cast<size_t>(bytes));
  for (size_t i = 0; i < content.size(); ++i) {
    content[i] = static_cast<char>(i * 31 % 113);
  }
  return content;
}

Job job_from(const TemporaryFile& file, Buffer& dst, int64_t count, DType from, DType to) {
  Job job{nullptr, dst.data(), count, from, to};
  job.file = file.descriptor();
  job.file_offset = kHead;
  return job;
}

void test_threads_cast_what_a_file_holds_as_if_it_were_in_memory() {
  constexpr int64_t kCount = 700'001;  // several buffers, several chunks, and a part of each
  const std::vector<char> content = numbers(kHead + kCount * 8);
  const TemporaryFile file(content);
  for (const auto& [from, to] : std::array<std::pair<DType, DType>, 4>{{{DType::Float32, DType::BFloat16},
                                                                        {DType::BFloat16, DType::Float32},
                                                                        {DType::Float64, DType::Float16},
                                                                        {DType::Byte, DType::Byte}}}) {
    for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{65'536}, kCount}) {
      Buffer read(count * size_of(to));
      Buffer expected(count * size_of(to));
      fastopt::kernels().find(from, to)(content.data() + kHead, expected.data(), count);
      const std::array jobs{job_from(file, read, count, from, to)};
      fastopt::run(jobs, fastopt::kernels(), 4, run_on_std_threads);
      check(std::memcmp(read.data(), expected.data(), static_cast<size_t>(count * size_of(to))) == 0, count,
            " elements came out of the file as others");
    }
  }
}

void test_threads_that_reach_the_end_of_a_file_too_early_raise_one_error() {
  constexpr int64_t kCount = 3'000'000;
  const TemporaryFile file(numbers(kHead + kCount));  // a quarter of what the job asks for
  Buffer dst(kCount * size_of(DType::BFloat16));
  for (const int64_t threads : {1, 4}) {
    const std::array jobs{job_from(file, dst, kCount, DType::Float32, DType::BFloat16)};
    try {
      fastopt::run(jobs, fastopt::kernels(), threads, run_on_std_threads);
    } catch (const ReadError& error) {
      check(error.code == 0, "errno ", error.code, " at the end of the file");
      check(error.offset >= kHead + kCount && error.bytes > 0, "the end was met at byte ", error.offset);
      continue;
    }
    check(false, "no error with ", threads, " threads");
  }
}

void test_a_file_that_cannot_be_read_raises_its_error() {
  Buffer dst(64);
  try {
    fastopt::read_at(/*descriptor=*/-1, 0, dst.data(), 64);
  } catch (const ReadError& error) {
    check(error.code == EBADF, "errno ", error.code);
    return;
  }
  check(false, "no error");
}

void test_a_window_holds_what_is_asked_of_it_in_any_order() {
  const std::vector<char> content = numbers(3 * fastopt::ReadWindow::kBytes + 11);
  const TemporaryFile file(content);
  const auto size = static_cast<int64_t>(content.size());
  fastopt::ReadWindow window;
  for (const int64_t offset : {int64_t{0}, int64_t{5}, size - 7, fastopt::ReadWindow::kBytes - 3, int64_t{1}, size}) {
    const int64_t bytes = std::min<int64_t>(1000, size - offset);
    const char* found = window.at(file.descriptor(), offset, bytes);
    check(reinterpret_cast<uintptr_t>(found) % 16 == static_cast<uintptr_t>(offset % 16), "not aligned at ", offset);
    check(std::memcmp(found, content.data() + offset, static_cast<size_t>(bytes)) == 0, "other bytes at ", offset);
  }
  try {
    window.at(file.descriptor(), size - 7, 8);
  } catch (const ReadError& error) {
    check(error.code == 0 && error.offset == size && error.bytes == 1, error.what());
    return;
  }
  check(false, "no error beyond the end");
}

}  // namespace

std::span<const Test> file_tests() {
  static constexpr std::array kTests{
      TEST(test_threads_cast_what_a_file_holds_as_if_it_were_in_memory),
      TEST(test_threads_that_reach_the_end_of_a_file_too_early_raise_one_error),
      TEST(test_a_file_that_cannot_be_read_raises_its_error),
      TEST(test_a_window_holds_what_is_asked_of_it_in_any_order),
  };
  return kTests;
}

}  // namespace core_test
