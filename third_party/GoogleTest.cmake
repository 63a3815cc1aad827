# GTest::gtest_main: the system's library, else the system's source package, else a download.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  set(GRINQH_GOOGLETEST_SOURCE "/usr/src/googletest" CACHE PATH "GoogleTest's sources")
  include(FetchContent)
  if(EXISTS "${GRINQH_GOOGLETEST_SOURCE}/CMakeLists.txt")
    set(FETCHCONTENT_SOURCE_DIR_GOOGLETEST "${GRINQH_GOOGLETEST_SOURCE}")
  endif()
  set(INSTALL_GTEST OFF CACHE BOOL "Install GoogleTest")
  set(BUILD_GMOCK OFF CACHE BOOL "Build GoogleMock")
  FetchContent_Declare(googletest
    URL https://github.com/google/googletest/archive/refs/tags/v1.17.0.tar.gz
    SYSTEM)
  FetchContent_MakeAvailable(googletest)
endif()
include(GoogleTest)
