"""Chromium without a window, asked through its own protocol: a page, its console, its pixels. Nothing but the standard
library."""
import base64, fcntl, json, os, select, shutil, subprocess, sys, tempfile, time

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
_launch = ('import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); '
           'os.execv(sys.argv[3], sys.argv[3:])')  # the protocol speaks through files 3 and 4


class Browser:
    "One page; `errors` is what its console complained of."
    def __init__(self):
        self.folder, self.errors, self.count, self.rest = tempfile.mkdtemp(), [], 0, b''
        self.messages = []
        (read, self.out), (self.back, write) = ([fcntl.fcntl(f, fcntl.F_DUPFD, 10) for f in os.pipe()] for _ in 'ab')
        self.process = subprocess.Popen(
            [sys.executable, '-c', _launch, str(read), str(write), CHROMIUM, '--headless=new', '--no-sandbox',
             '--disable-gpu', '--remote-debugging-pipe', f'--user-data-dir={self.folder}', 'about:blank'],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for f in (read, write): os.close(f)
        target = self.ask('Target.createTarget', session=None, url='about:blank')['targetId']
        self.session = self.ask('Target.attachToTarget', session=None, targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'): self.ask(f'{domain}.enable')

    def __enter__(self): return self

    def __exit__(self, *_):
        try: self.ask('Browser.close', session=None)
        except (OSError, TimeoutError): self.process.kill()
        self.process.wait(30)
        for f in (self.out, self.back): os.close(f)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _next(self, until):
        "The next message, events kept."
        while b'\0' not in self.rest:
            if not select.select([self.back], [], [], max(0, until - time.time()))[0]: raise TimeoutError('Chromium')
            if not (more := os.read(self.back, 1 << 20)): raise OSError('Chromium has gone')
            self.rest += more
        text, _, self.rest = self.rest.partition(b'\0')
        message = json.loads(text)
        method, said = message.get('method'), message.get('params', {})
        if (method == 'Runtime.exceptionThrown' or method == 'Log.entryAdded' and said['entry']['level'] == 'error'
                or method == 'Runtime.consoleAPICalled' and said['type'] == 'error'): self.errors.append(said)
        return message

    def ask(self, method, session='own', **params):
        "What the protocol's method gives back."
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if session: message['sessionId'] = self.session
        os.write(self.out, json.dumps(message).encode() + b'\0')
        until = time.time() + 120
        while (answer := self._next(until)).get('id') != self.count: self.messages.append(answer.get('method'))
        if 'error' in answer: raise RuntimeError(f"{method}: {answer['error']}")
        return answer['result']

    def open(self, address):
        "Go to an address, and wait until it is loaded."
        self.ask('Page.navigate', url='about:blank')  # else an address that differs behind the # is no new page
        self.messages.clear()
        self.ask('Page.navigate', url=address)
        until = time.time() + 120
        while 'Page.loadEventFired' not in self.messages: self.messages.append(self._next(until).get('method'))
        self.messages.clear()
        while self.run("document.readyState + (location.href == 'about:blank')") != 'completefalse': time.sleep(.05)

    def run(self, code):
        "The value of a JavaScript expression."
        answer = self.ask('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in answer: raise RuntimeError(answer['exceptionDetails'])
        return answer['result'].get('value')

    def size(self, width, height=900, dark=False):
        "How wide the window is, and whether people want it dark."
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 600)
        scheme = [dict(name='prefers-color-scheme', value='dark' if dark else 'light')]
        self.ask('Emulation.setEmulatedMedia', features=scheme)

    def press(self, key, code):
        "A key, by its name and number."
        for kind in ('keyDown', 'keyUp'):
            self.ask('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def shot(self, selector=None):
        "PNG of the page, or of an element."
        box = self.run(f'(({{x, y, width, height}}) => [x + scrollX, y + scrollY, width, height])'
                       f'(document.querySelector({json.dumps(selector)}).getBoundingClientRect())' if selector else
                       '[0, 0, innerWidth, document.scrollingElement.scrollHeight]')
        clip = dict(zip(('x', 'y', 'width', 'height'), box), scale=1)
        return base64.b64decode(self.ask('Page.captureScreenshot', clip=clip, captureBeyondViewport=True)['data'])
