// A browser starts no worker for a page that is opened from a folder (file://). There, the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      const start = () => {
        document.body.append(frame)
        const inner = frame.contentWindow
        inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inner.document.createElement("script")
        script.src = url
        script.onload = () => {
          this.postMessage = data => inner.dispatchEvent(new inner.MessageEvent("message", { data }))
          this.waiting.forEach(this.postMessage)
        }
        inner.document.body.append(script)
      }
      this.waiting = []
      if (document.body) start()
      else addEventListener("DOMContentLoaded", start)
    }

    postMessage(data) {
      this.waiting.push(data)
    }
  }
}
