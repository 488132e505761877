;; Asks for 4 GiB less a page, and for 2^32 - 1 pages. Both are refused with -1.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (i32.sub (i32.add (memory.grow (i32.const 65534)) (memory.grow (i32.const -1))) (i32.const -2))))
