// Large pages for large results. Fresh memory is handed out by the kernel page by page as it is first written, which
// costs several times the writing itself; asking for pages of 2 MiB makes that cost small.
#pragma once

#include <cstdint>

namespace cpc {

// A hint that may be ignored, for memory that is about to be written whole. Small ranges are left alone.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace cpc
