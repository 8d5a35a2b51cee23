// The scratch memory of parallel loops: one buffer a calling thread, grown when a loop asks for more.
#include "core/parallel.h"

#include "core/aligned_buffer.h"

namespace cpc {

Scratch::Scratch(int64_t bytes)
    : pitch_((bytes + AlignedBuffer::kAlignment - 1) / AlignedBuffer::kAlignment * AlignedBuffer::kAlignment) {
  thread_local AlignedBuffer buffer;
  base_ = buffer.reserve(pitch_ * workers());
}

}  // namespace cpc
